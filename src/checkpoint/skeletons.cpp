#include "checkpoint/skeletons.h"

#include <dlfcn.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <vector>

#include <c10/util/Exception.h>
#include <nlohmann/json.hpp>

namespace sag {
namespace {

namespace fs = std::filesystem;

// share/sag/skeletons where this library, or the program that it is linked into, was installed:
// lib, lib64, lib/x86_64-linux-gnu and bin are folders beside share, or in one that is.
std::vector<std::string> beside_library() {
  Dl_info here = {};
  if (dladdr(reinterpret_cast<const void*>(&find_skeleton), &here) == 0 || !here.dli_fname)
    return {};
  std::error_code error;
  const auto folder = fs::canonical(here.dli_fname, error).parent_path();
  if (error) return {};
  constexpr const char* kSkeletons = "share/sag/skeletons";
  return {(folder.parent_path() / kSkeletons).string(),
          (folder.parent_path().parent_path() / kSkeletons).string()};
}

std::vector<std::string> places() {
  if (const char* chosen = std::getenv("SAG_SKELETONS"); chosen && *chosen) return {chosen};
  auto places = beside_library();
#ifdef SAG_SKELETONS_SOURCE
  places.emplace_back(SAG_SKELETONS_SOURCE);
#endif
  return places;
}

}  // namespace

std::string find_skeleton(const std::string& family, const std::string& folder) {
  std::string tried;
  for (const auto& place : folder.empty() ? places() : std::vector{folder}) {
    const auto skeleton = fs::path(place) / family;
    std::error_code error;
    if (fs::is_regular_file(skeleton / "unet.ts", error)) return skeleton.string();
    tried += (tried.empty() ? "\"" : ", \"") + skeleton.string() + "\"";
  }
  C10_THROW_ERROR(
      ValueError,
      c10::str("[Checkpoint::open] the skeleton of ", family,
               " must be there for its checkpoints, got none in ", tried,
               ": install sag with its skeletons, or name their folder in SAG_SKELETONS."));
}

Prediction skeleton_prediction(const std::string& skeleton) {
  std::ifstream file(fs::path(skeleton) / "model.json");
  const auto content = nlohmann::json::parse(file, nullptr, /*allow_exceptions=*/false);
  const bool has =
      content.is_object() && content.contains("prediction") && content["prediction"].is_string();
  const auto name = has ? content["prediction"].get<std::string>() : "nothing";
  TORCH_CHECK_VALUE(name == "eps" || name == "v" || name == "x0",
                    "[Checkpoint::open] skeleton must be a folder whose model.json has the "
                    "prediction eps, v or x0, got \"",
                    skeleton, "\" with ", name, ".");
  return parse_prediction(name);
}

}  // namespace sag
