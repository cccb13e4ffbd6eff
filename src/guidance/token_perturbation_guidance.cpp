#include "sag/token_perturbation_guidance.h"

#include <array>
#include <bit>
#include <random>

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>

#include "perturbation.h"
#include "window.h"

namespace sag {
namespace {

constexpr const char* kCaller = "apply_token_perturbation_guidance";

// The same for the same seed, step, noise level and block.
torch::Tensor order_of(std::int64_t tokens, std::uint64_t seed, const PerturbedRows& at) {
  const auto sigma = std::bit_cast<std::uint64_t>(at.pass.sigma);
  const auto step = static_cast<std::uint64_t>(at.pass.step_index);
  std::array<std::uint32_t, 2> drawn = {};
  // It takes 32 bits of each.
  std::seed_seq({seed, seed >> 32, step, sigma, sigma >> 32, std::uint64_t{at.site}})
      .generate(drawn.begin(), drawn.end());
  auto generator = at::detail::createCPUGenerator(std::uint64_t{drawn[0]} << 32 | drawn[1]);
  return at::randperm(tokens, generator, torch::TensorOptions(torch::kLong));
}

torch::Tensor shuffled(std::uint64_t seed, const PerturbedRows& at, const NextAttention& next) {
  auto out = next(at.call).clone();
  const auto order = order_of(out.size(1), seed, at).to(out.device());
  for (const auto& rows : at.rows) rows.of(out).copy_(rows.of(out).index_select(1, order));
  return out;
}

}  // namespace

ModelPatcher apply_token_perturbation_guidance(const ModelPatcher& model,
                                               const TokenPerturbationGuidanceOptions& options) {
  check_perturbation(options.scale, options.blocks, kCaller);
  return guide_by_perturbation(
      model, {.owner = Owner("token_perturbation_guidance"),
              .what = Perturbed::blocks,
              .sites = options.blocks,
              .perturb = [seed = options.seed](
                             const PerturbedRows& at,
                             const NextAttention& next) { return shuffled(seed, at, next); },
              .scale = [scale = options.scale](double) { return scale; },
              .window = in_sigmas(options.window, model.model_sampling(), kCaller),
              .capturable = false});
}

}  // namespace sag
