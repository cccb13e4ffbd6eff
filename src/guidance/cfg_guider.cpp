#include "sag/cfg_guider.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "sag/calc_cond_batch.h"

namespace sag {
namespace {

void check_options(const CfgGuiderOptions& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.cond_scale),
                    "[CfgGuider] cond_scale must be finite, got ", options.cond_scale, ".");
  TORCH_CHECK_VALUE(options.max_rows >= 0, "[CfgGuider] max_rows must be at least 0, got ",
                    options.max_rows, ".");
  for (std::size_t i = 0; i < options.sigmas.size(); ++i) {
    const double sigma = options.sigmas[i];
    TORCH_CHECK_VALUE(std::isfinite(sigma) && sigma >= 0,
                      "[CfgGuider] sigmas must be finite and at least 0, got ", sigma, " at ", i,
                      ".");
    TORCH_CHECK_VALUE(i == 0 || sigma < options.sigmas[i - 1],
                      "[CfgGuider] sigmas must fall strictly, got ", sigma, " at ", i, " after ",
                      options.sigmas[i - 1], ".");
  }
}

// The largest i with sigmas[i] >= sigma; 0 before the first. Samplers compute sigmas anew, and may
// miss one of the schedule by its last bit.
std::int64_t step_of(const std::vector<double>& sigmas, double sigma) {
  const auto reaches = [sigma](double s) { return s >= sigma * (1 - kSigmaTolerance); };
  const auto after = std::partition_point(sigmas.begin(), sigmas.end(), reaches);
  return std::max<std::int64_t>(after - sigmas.begin() - 1, 0);
}

// ComfyUI's tolerance for "cfg is 1".
bool is_one(double cond_scale) {
  return std::abs(cond_scale - 1.0) <= 1e-9 * std::max(std::abs(cond_scale), 1.0);
}

bool post_cfg_needs_uncond(const ModelPatcher& model, const StepContext& step) {
  const auto& functions = model.post_cfg_functions();
  return std::any_of(functions.begin(), functions.end(), [&](const InstalledPostCfg& installed) {
    return installed.options.needs_uncond && installed.options.needs_uncond(step);
  });
}

// No UNet takes contexts, or vectors y, of two widths: better said here than by its layers.
void check_one_width(const std::vector<Conditioning>& conds) {
  std::int64_t context_width = -1, y_width = -1;
  const auto check = [](const torch::Tensor& t, std::int64_t& width, const char* what) {
    if (!t.defined()) return;
    if (width < 0) width = t.size(-1);
    TORCH_CHECK_VALUE(t.size(-1) == width, "[CfgGuider] the ", what,
                      " of all conditionings must have one width, got ", width, " and ", t.size(-1),
                      ".");
  };
  for (const auto& cond : conds) {
    check(cond.context, context_width, "context");
    check(cond.y, y_width, "y");
  }
}

// Once a run, before anything is evaluated: it reads from the device.
void check_given(const std::vector<Conditioning>& positive,
                 const std::vector<Conditioning>& negative) {
  TORCH_CHECK_VALUE(!positive.empty() || !negative.empty(),
                    "[CfgGuider] there must be at least one positive or negative conditioning.");
  auto all = positive;
  all.insert(all.end(), negative.begin(), negative.end());
  for (const auto& cond : all) check_conditioning_values(cond, "CfgGuider");
  check_one_width(all);
}

void check_evaluation(const torch::Tensor& x, double sigma) {
  TORCH_CHECK_VALUE(
      x.defined() && x.dim() == 4 && x.numel() > 0,
      "[CfgGuider] x must have shape [images, channels, height, width], none of them 0, got ",
      x.defined() ? c10::str(x.sizes()) : "an undefined tensor", ".");
  TORCH_CHECK_VALUE(std::isfinite(sigma) && sigma > 0,
                    "[CfgGuider] sigma must be finite and > 0, got ", sigma, ".");
}

// Once a run, so that no step copies from the host.
std::vector<Conditioning> on_device(std::vector<Conditioning> conds, torch::Device device) {
  for (auto& cond : conds) cond = to_device(std::move(cond), device);
  return conds;
}

bool any_active(const std::vector<Conditioning>& conds, double sigma) {
  return std::any_of(conds.begin(), conds.end(),
                     [sigma](const auto& cond) { return is_active(cond, sigma); });
}

torch::Tensor cfg(const ModelPatcher& model, const CfgArgs& args) {
  if (!args.uncond_denoised.defined()) return args.cond_denoised;
  if (!args.cond_denoised.defined()) return args.uncond_denoised;
  if (model.cfg_function()) return model.cfg_function()(args);
  return args.uncond_denoised + (args.cond_denoised - args.uncond_denoised) * args.cond_scale;
}

// What a guidance has evaluated must not pass for the main pass, whose rows hooks record.
void check_rows(const torch::Tensor& rows, const Owner& owner, const torch::Tensor& x) {
  TORCH_CHECK_VALUE(rows.defined() && rows.sizes() == x.sizes(),
                    "[CfgGuider] the x of a guidance's rows must have the shape of x, ", x.sizes(),
                    ", got ", rows.defined() ? c10::str(rows.sizes()) : "an undefined tensor", ".");
  TORCH_CHECK_VALUE(owner != Owner::main,
                    "[CfgGuider] the owner of a guidance's rows must be a named Owner, got the "
                    "main pass.");
}

void check_shape(const torch::Tensor& t, const torch::Tensor& x, const char* what) {
  TORCH_CHECK_VALUE(t.defined() && t.sizes() == x.sizes(), "[CfgGuider] a ", what,
                    " must return the shape of x, ", x.sizes(), ", got ",
                    t.defined() ? c10::str(t.sizes()) : "an undefined tensor", ".");
}

}  // namespace

std::int64_t GuiderReport::unet_calls() const {
  std::int64_t sum = 0;
  for (const auto& evaluation : evaluations) sum += evaluation.unet_calls;
  return sum;
}

std::int64_t GuiderReport::unet_rows() const {
  std::int64_t sum = 0;
  for (const auto& evaluation : evaluations) sum += evaluation.unet_rows;
  return sum;
}

std::int64_t GuiderReport::guided() const {
  return std::count_if(
      evaluations.begin(), evaluations.end(), [](const EvaluationReport& evaluation) {
        return std::any_of(evaluation.guidances.begin(), evaluation.guidances.end(),
                           [](const GuidanceNote& note) { return note.guided; });
      });
}

std::map<std::string, std::int64_t> GuiderReport::skipped() const {
  std::map<std::string, std::int64_t> counts;
  for (const auto& evaluation : evaluations)
    for (const auto& note : evaluation.guidances)
      if (!note.guided) ++counts[note.reason];
  return counts;
}

CfgGuider::CfgGuider(ModelPatcher model, std::vector<Conditioning> positive,
                     std::vector<Conditioning> negative, const CfgGuiderOptions& options)
    : model_(std::move(model)), options_(options) {
  check_options(options_);
  check_given(positive, negative);
  for (const auto& installed : model_.post_cfg_functions())
    TORCH_CHECK_VALUE(
        !installed.options.needs_steps || !options_.sigmas.empty(),
        "[CfgGuider] sigmas must be the run's, as a guidance of this model depends on "
        "the step (interval, one_pass), got none.");
  positive_ = on_device(std::move(positive), model_.unet().device());
  negative_ = on_device(std::move(negative), model_.unet().device());
}

CfgGuider::CfgGuider(ModelPatcher model, std::vector<Conditioning> positive,
                     std::vector<Conditioning> negative)
    : CfgGuider(std::move(model), std::move(positive), std::move(negative), CfgGuiderOptions{}) {}

torch::Tensor CfgGuider::operator()(const torch::Tensor& x, double sigma) {
  return evaluate(x, sigma, false).denoised;
}

Denoised CfgGuider::predict_both(const torch::Tensor& x, double sigma) {
  return evaluate(x, sigma, true);
}

const std::vector<Conditioning>& CfgGuider::conds_of(Branch branch) const {
  return branch == Branch::cond ? positive_ : negative_;
}

Denoised CfgGuider::evaluate(const torch::Tensor& x, double sigma, bool keep_uncond) {
  check_evaluation(x, sigma);
  TORCH_CHECK_VALUE(any_active(positive_, sigma) || any_active(negative_, sigma),
                    "[CfgGuider] no conditioning is active at sigma ", sigma, ".");
  const torch::NoGradGuard no_grad;
  StepContext step(sigma, step_of(options_.sigmas, sigma), x.size(2), x.size(3));
  EvaluationReport report{.sigma = sigma, .step_index = step.step_index()};

  const auto evaluate_batch = [&](std::span<const CondRequest> requests) {
    auto batch = calc_cond_batch(model_, requests, sigma, step, {.max_rows = options_.max_rows});
    report.unet_calls += batch.unet_calls;
    report.unet_rows += batch.unet_rows;
    return batch.denoised;
  };

  const bool needs_uncond = keep_uncond || !is_one(options_.cond_scale) ||
                            !any_active(positive_, sigma) || post_cfg_needs_uncond(model_, step);
  std::vector<CondRequest> requests = {
      {.branch = Branch::uncond,
       .x = x,
       .conds = needs_uncond ? negative_ : std::vector<Conditioning>{}},
      {.branch = Branch::cond, .x = x, .conds = positive_}};
  std::vector<std::size_t> early;  // by post-CFG function: which request is its; 0: none
  for (const auto& installed : model_.post_cfg_functions()) {
    early.push_back(0);
    if (!installed.options.early) continue;
    const auto rows = installed.options.early({x, sigma, model_.model_sampling(), step, run_});
    if (!rows) continue;
    check_rows(rows->x, rows->owner, x);
    early.back() = requests.size();
    requests.push_back({rows->branch, rows->owner, rows->x, conds_of(rows->branch)});
  }
  const auto denoised = evaluate_batch(requests);

  CfgPredictions predictions{.cond_denoised = denoised[1], .uncond_denoised = denoised[0]};
  const auto args = [&] {
    return CfgArgs{predictions.cond_denoised,
                   predictions.uncond_denoised,
                   options_.cond_scale,
                   x,
                   sigma,
                   step};
  };
  for (const auto& function : model_.pre_cfg_functions()) {
    const auto before = predictions;
    predictions = function(args());
    if (before.cond_denoised.defined())
      check_shape(predictions.cond_denoised, x, "pre-CFG function");
    if (before.uncond_denoised.defined())
      check_shape(predictions.uncond_denoised, x, "pre-CFG function");
  }
  auto result = cfg(model_, args());
  check_shape(result, x, "CFG function");

  const auto predict = [&](const torch::Tensor& x_again, Branch branch, const Owner& owner) {
    check_rows(x_again, owner, x);
    const CondRequest request{branch, owner, x_again, conds_of(branch)};
    return evaluate_batch({&request, 1}).front();
  };
  for (std::size_t i = 0; i < early.size(); ++i) {
    const auto& installed = model_.post_cfg_functions()[i];
    result =
        installed.function(PostCfgArgs{.denoised = result,
                                       .cond_denoised = predictions.cond_denoised,
                                       .uncond_denoised = predictions.uncond_denoised,
                                       .cond_scale = options_.cond_scale,
                                       .x = x,
                                       .sigma = sigma,
                                       .model_sampling = model_.model_sampling(),
                                       .step = step,
                                       .run = run_,
                                       .predict = predict,
                                       .early = early[i] ? denoised[early[i]] : torch::Tensor()});
    check_shape(result, x, "post-CFG function");
  }

  report.guidances = step.notes();
  report_.evaluations.push_back(std::move(report));
  return {result, predictions.uncond_denoised};
}

}  // namespace sag
