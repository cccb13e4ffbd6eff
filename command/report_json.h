#pragma once

#include <optional>
#include <string>
#include <vector>

#include "inputs.h"
#include "options.h"
#include "report.h"
#include "sag/cuda_graph_unet.h"
#include "settings.h"

namespace sag_sample {

/// Returns the report of --json: what was decided, every picture, and every run with its steps.
std::string report_json(const Options& options, const Settings& settings, const Inputs& inputs,
                        const std::vector<RunReport>& runs,
                        const std::optional<sag::CudaGraphReport>& graphs);

}  // namespace sag_sample
