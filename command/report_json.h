#pragma once

#include <string>
#include <vector>

#include "inputs.h"
#include "report.h"
#include "sag/unet.h"
#include "sampling.h"
#include "settings.h"

namespace sag_sample {

/// Returns the report of --json: what was decided, every picture, and every run with its steps.
std::string report_json(const Settings& settings, const Inputs& inputs, const SamplingPlan& plan,
                        const std::vector<RunReport>& runs, const sag::UNet& unet);

}  // namespace sag_sample
