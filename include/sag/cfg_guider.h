#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/conditioning.h"
#include "sag/denoised.h"
#include "sag/export.h"
#include "sag/guidance_window.h"
#include "sag/model_patcher.h"
#include "sag/run_context.h"
#include "sag/step_context.h"
#include "sag/unet.h"

namespace sag {

/// One evaluation of a guider.
struct EvaluationReport {
  /// The noise level.
  double sigma = 0;
  /// The step that it belongs to (`CfgGuider::begin_run`).
  std::int64_t step_index = 0;
  /// How often the UNet was called.
  std::int64_t unet_calls = 0;
  /// How many rows it evaluated in all calls together.
  std::int64_t unet_rows = 0;
  /// How many of them only filled calls up (`UNet::evaluated_rows`).
  std::int64_t filler_rows = 0;
  /// One per guidance, in their order.
  std::vector<GuidanceNote> guidances = {};
};

/// What a guider did in its run so far.
struct SAG_API GuiderReport {
  /// In order.
  std::vector<EvaluationReport> evaluations = {};
  /// Which self-attention was chosen for each hook of the model, and why.
  std::vector<SiteChoice> sites = {};

  /// Returns how often the UNet was called.
  std::int64_t unet_calls() const;
  /// Returns how many rows the UNet evaluated.
  std::int64_t unet_rows() const;
  /// Returns how many of them only filled calls up.
  std::int64_t filler_rows() const;
  /// Number of evaluations that at least one guidance guided.
  std::int64_t guided() const;
  /// How often guidances did not guide, by reason.
  std::map<std::string, std::int64_t> skipped() const;
};

/// How a guider combines and evaluates predictions.
struct CfgGuiderOptions {
  /// 1: the conditional prediction alone, and no unconditional rows unless a guidance needs them.
  double cond_scale = 1.0;
  /// The noise levels at which cond_scale acts; at all others it is 1, which saves the
  /// unconditional rows (CFG interval, 2404.07724). Default: all.
  GuidanceWindow cfg_window = {};
  /// The most rows in one UNet call; 0: no limit. See `CalcCondBatchOptions`.
  std::int64_t max_rows = 0;
};

/// Classifier-free guidance and everything that is patched onto the model: the function `denoised =
/// guider(x, σ)` that samplers call. A guider makes one run at a time: it holds the report and what
/// guidances keep from step to step. The patched model may be shared with other guiders on other
/// threads.
/// ComfyUI: `CFGGuider`, `sampling_function`, `cfg_function`.
class SAG_API CfgGuider {
 public:
  /// Several positives or negatives are averaged (see `calc_cond_batch`). Without positives the
  /// result is the unconditional prediction, guided: this is how to draw an unconditional picture.
  /// Throws ValueError when both are empty, on a scale that is not finite, on a window that ends
  /// before it starts, on conditionings with
  /// NaN or infinity (checked here, not in every evaluation) or a mask outside 0 … 1, and on
  /// contexts or y of different widths, or concat of different channels.
  CfgGuider(ModelPatcher model, std::vector<Conditioning> positive,
            std::vector<Conditioning> negative, const CfgGuiderOptions& options = {});

  /// Samplers take it by reference, std::ref(guider).
  CfgGuider(const CfgGuider&) = delete;
  CfgGuider& operator=(const CfgGuider&) = delete;

  /// Begins a run over these sigmas, the ones that the sampler gets. `sample` calls it; a sampling
  /// loop of your own calls it before its first step. An evaluation at σ belongs to step i, the
  /// largest i with sigmas[i] >= σ, so Heun's corrector counts as the next step. Drops the report
  /// of the previous run, and what guidances kept in it. Without it every evaluation is step 0, and
  /// guidances that depend on the step make the guider throw. Throws ValueError on sigmas that do
  /// not fall.
  void begin_run(std::vector<double> sigmas);

  /// Returns the denoised latent, the shape of x, fp32 (fp64 for fp64 x).
  /// x: [images, channels, height, width], floating. Runs without gradients.
  /// Throws ValueError or TypeError on any other x, on sigma <= 0, and when a guidance depends on
  /// the step and `begin_run` was not called; rethrows what hooks and functions threw. The guider
  /// and the model work afterwards.
  torch::Tensor operator()(const torch::Tensor& x, double sigma);

  /// Like operator(), but also returns the unconditional prediction, from before any post-CFG
  /// function and evaluated at cond_scale 1 too, as CFG++ samplers need it. It is undefined where
  /// no negative is active.
  Denoised predict_both(const torch::Tensor& x, double sigma);

  /// Returns the patched model.
  const ModelPatcher& model() const { return model_; }
  /// Returns what was done in the run so far.
  const GuiderReport& report() const { return report_; }

 private:
  Denoised evaluate(const torch::Tensor& x, double sigma, bool keep_uncond);

  ModelPatcher model_;
  Conditionings prompts_;
  CfgGuiderOptions options_;
  std::vector<double> sigmas_;
  GuiderReport report_;
  RunContext run_;
};

}  // namespace sag
