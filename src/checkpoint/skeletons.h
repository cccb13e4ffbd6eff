#pragma once

#include <string>

#include "sag/model_sampling.h"

namespace sag {

/// Returns the folder of a family's skeleton: in `folder`, or, if that is empty, where skeletons
/// are: the environment's SAG_SKELETONS, beside the installed library, or in the tree that it was
/// built from. Throws ValueError, naming the places, if it is in none of them.
std::string find_skeleton(const std::string& family, const std::string& folder);

/// Returns what a skeleton's model.json says that the family predicts. Throws ValueError if the
/// folder has none, or its prediction is none of eps, v and x0.
Prediction skeleton_prediction(const std::string& skeleton);

}  // namespace sag
