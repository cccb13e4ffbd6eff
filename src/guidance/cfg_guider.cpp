#include "sag/cfg_guider.h"

#include <algorithm>
#include <cmath>
#include <span>
#include <utility>

#include "model/conditioning_checks.h"
#include "model/latent.h"
#include "sag/calc_cond_batch.h"
#include "window.h"

namespace sag {
namespace {

void check_options(const CfgGuiderOptions& options) {
  TORCH_CHECK_VALUE(std::isfinite(options.cond_scale),
                    "[CfgGuider] cond_scale must be finite, got ", options.cond_scale, ".");
  TORCH_CHECK_VALUE(options.max_rows >= 0, "[CfgGuider] max_rows must be at least 0, got ",
                    options.max_rows, ".");
}

void check_sigmas(const std::vector<double>& sigmas) {
  for (std::size_t i = 0; i < sigmas.size(); ++i) {
    TORCH_CHECK_VALUE(std::isfinite(sigmas[i]) && sigmas[i] >= 0,
                      "[CfgGuider::begin_run] sigmas must be finite and at least 0, got ",
                      sigmas[i], " at ", i, ".");
    TORCH_CHECK_VALUE(i == 0 || sigmas[i] < sigmas[i - 1],
                      "[CfgGuider::begin_run] sigmas must fall strictly, got ", sigmas[i], " at ",
                      i, " after ", sigmas[i - 1], ".");
  }
}

// The largest i with sigmas[i] >= sigma; 0 before the first. Samplers compute sigmas again, and the
// last bit may differ from the schedule's.
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

std::vector<Conditioning> all_of(std::vector<Conditioning> positive,
                                 const std::vector<Conditioning>& negative) {
  positive.insert(positive.end(), negative.begin(), negative.end());
  return positive;
}

// No UNet takes contexts, or vectors y, of two widths, or sometimes more channels and sometimes
// fewer. An error here is clearer than one in its layers.
void check_one_width(const std::vector<Conditioning>& conds) {
  std::int64_t context_width = -1, y_width = -1;
  const auto check = [](const torch::Tensor& t, std::int64_t& width, const char* what) {
    if (!t.defined()) return;
    if (width < 0) width = t.size(-1);
    TORCH_CHECK_VALUE(t.size(-1) == width, "[CfgGuider] the ", what,
                      " of all conditionings must have one width, got ", width, " and ", t.size(-1),
                      ".");
  };
  const auto channels = [](const Conditioning& cond) {
    return cond.concat.defined() ? cond.concat.size(1) : 0;
  };
  for (const auto& cond : conds) {
    check(cond.context, context_width, "context");
    check(cond.y, y_width, "y");
    TORCH_CHECK_VALUE(channels(cond) == channels(conds.front()),
                      "[CfgGuider] the concat of all conditionings must have as many channels, "
                      "also those of the negatives, got ",
                      channels(conds.front()), " and ", channels(cond), ".");
  }
}

// Called once per run, before anything is evaluated, because it reads from the device.
void check_given(const std::vector<Conditioning>& positive,
                 const std::vector<Conditioning>& negative) {
  TORCH_CHECK_VALUE(!positive.empty() || !negative.empty(),
                    "[CfgGuider] there must be at least one positive or negative conditioning.");
  const auto all = all_of(positive, negative);
  for (const auto& cond : all) check_conditioning_values(cond, "CfgGuider");
  check_one_width(all);
}

void check_evaluation(const torch::Tensor& x, double sigma) {
  check_latent(x, "x", "CfgGuider");
  TORCH_CHECK_VALUE(std::isfinite(sigma) && sigma > 0,
                    "[CfgGuider] sigma must be finite and > 0, got ", sigma, ".");
}

void check_steps_are_known(const ModelPatcher& model, const std::vector<double>& sigmas) {
  for (const auto& installed : model.post_cfg_functions())
    TORCH_CHECK_VALUE(!installed.options.needs_steps || !sigmas.empty(),
                      "[CfgGuider] sigmas must be known, as a guidance of this model depends "
                      "on the step, got none: call begin_run or sample.");
}

// Called once per run, so that no step copies from the host.
std::vector<Conditioning> on_device(std::vector<Conditioning> conds, torch::Device device) {
  for (auto& cond : conds) cond = to_device(std::move(cond), device);
  return conds;
}

// What the model's functions make of the prompts.
Conditionings changed_prompts(const ModelPatcher& model, Conditionings prompts, StepContext& step) {
  if (model.conditioning_functions().empty()) return prompts;
  for (const auto& function : model.conditioning_functions())
    prompts = function(std::move(prompts), step);
  prompts.positive = on_device(std::move(prompts.positive), model.unet().device());
  prompts.negative = on_device(std::move(prompts.negative), model.unet().device());
  check_one_width(all_of(prompts.positive, prompts.negative));
  return prompts;
}

bool any_active(const std::vector<Conditioning>& conds, double sigma) {
  return std::any_of(conds.begin(), conds.end(),
                     [sigma](const auto& cond) { return is_active(cond, sigma); });
}

torch::Tensor cfg(const ModelPatcher& model, const CfgArgs& args) {
  if (!args.uncond_denoised.defined()) return args.cond_denoised;
  if (!args.cond_denoised.defined()) return args.uncond_denoised;
  if (model.cfg_function()) return model.cfg_function()(args);
  // To the bit what it is where nobody needs the unconditional prediction.
  if (is_one(args.cond_scale)) return args.cond_denoised;
  return args.uncond_denoised + (args.cond_denoised - args.uncond_denoised) * args.cond_scale;
}

// Rows of a guidance must not look like those of the main pass, which hooks record.
void check_rows(const torch::Tensor& rows, const Owner& owner, const torch::Tensor& x) {
  TORCH_CHECK_VALUE(rows.defined() && rows.sizes() == x.sizes(),
                    "[CfgGuider] the x of a guidance's rows must have the shape of x, ", x.sizes(),
                    ", got ", shape_text(rows), ".");
  TORCH_CHECK_VALUE(owner != Owner::main,
                    "[CfgGuider] the owner of a guidance's rows must be a named Owner, got the "
                    "main pass.");
}

const std::vector<Conditioning>& of_branch(const Conditionings& prompts, Branch branch) {
  return branch == Branch::cond ? prompts.positive : prompts.negative;
}

/// One evaluation, from the rows of the main call to the last post-CFG function.
class Evaluation {
 public:
  Evaluation(const ModelPatcher& model, const Conditionings& prompts,
             const CfgGuiderOptions& options, RunContext& run, StepContext& step,
             EvaluationReport& report, const torch::Tensor& x)
      : model_(model),
        prompts_(prompts),
        options_(options),
        run_(run),
        step_(step),
        report_(report),
        x_(x),
        early_(model.post_cfg_functions().size()) {}

  Denoised run(bool keep_uncond) {
    auto predictions = main_call(keep_uncond);
    predictions = apply_pre_cfg(std::move(predictions));
    auto denoised = cfg(model_, args(predictions));
    check_returns_shape(denoised, x_, "a CFG function", "CfgGuider");
    denoised = apply_post_cfg(std::move(denoised), predictions);
    return {denoised, predictions.uncond_denoised};
  }

 private:
  double sigma() const { return step_.sigma(); }

  double cond_scale() const {
    return contains(options_.cfg_window, sigma()) ? options_.cond_scale : 1.0;
  }

  std::vector<torch::Tensor> evaluate(std::span<const CondRequest> requests) {
    auto batch = calc_cond_batch(model_, requests, sigma(), step_, {.max_rows = options_.max_rows});
    report_.unet_calls += batch.unet_calls;
    report_.unet_rows += batch.unet_rows;
    report_.filler_rows += batch.filler_rows;
    return batch.denoised;
  }

  bool needs_uncond() const {
    return !is_one(cond_scale()) || !any_active(prompts_.positive, sigma()) ||
           post_cfg_needs_uncond(model_, step_);
  }

  // Both predictions, and in the same call the rows that post-CFG functions ask for early.
  CfgPredictions main_call(bool keep_uncond) {
    std::vector<CondRequest> requests = {{.branch = Branch::uncond, .x = x_},
                                         {.branch = Branch::cond, .x = x_}};
    if (keep_uncond || needs_uncond()) requests[0].conds = prompts_.negative;
    requests[1].conds = prompts_.positive;
    const auto& functions = model_.post_cfg_functions();
    std::vector<std::size_t> asked;
    for (std::size_t i = 0; i < functions.size(); ++i) {
      if (!functions[i].options.early) continue;
      const auto rows =
          functions[i].options.early({x_, sigma(), model_.model_sampling(), step_, run_});
      if (!rows) continue;
      check_rows(rows->x, rows->owner, x_);
      requests.push_back({rows->branch, rows->owner, rows->x, of_branch(prompts_, rows->branch)});
      asked.push_back(i);
    }
    const auto denoised = evaluate(requests);
    for (std::size_t i = 0; i < asked.size(); ++i) early_[asked[i]] = denoised[i + 2];
    return {.cond_denoised = denoised[1], .uncond_denoised = denoised[0]};
  }

  CfgArgs args(const CfgPredictions& predictions) {
    return {
        predictions.cond_denoised, predictions.uncond_denoised, cond_scale(), x_, sigma(), step_};
  }

  CfgPredictions apply_pre_cfg(CfgPredictions predictions) {
    for (const auto& function : model_.pre_cfg_functions()) {
      const auto before = predictions;
      predictions = function(args(before));
      const auto check = [&](const torch::Tensor& given, const torch::Tensor& returned) {
        if (given.defined()) check_returns_shape(returned, x_, "a pre-CFG function", "CfgGuider");
      };
      check(before.cond_denoised, predictions.cond_denoised);
      check(before.uncond_denoised, predictions.uncond_denoised);
    }
    return predictions;
  }

  torch::Tensor predict(const torch::Tensor& x, Branch branch, const Owner& owner) {
    check_rows(x, owner, x_);
    const CondRequest request{branch, owner, x, of_branch(prompts_, branch)};
    return evaluate({&request, 1}).front();
  }

  torch::Tensor apply_post_cfg(torch::Tensor denoised, const CfgPredictions& predictions) {
    for (std::size_t i = 0; i < early_.size(); ++i) {
      denoised = model_.post_cfg_functions()[i].function(
          {.denoised = denoised,
           .cond_denoised = predictions.cond_denoised,
           .uncond_denoised = predictions.uncond_denoised,
           .cond_scale = cond_scale(),
           .x = x_,
           .sigma = sigma(),
           .model_sampling = model_.model_sampling(),
           .step = step_,
           .run = run_,
           .predict = [this](const auto& x, Branch branch,
                             const auto& owner) { return predict(x, branch, owner); },
           .early = early_[i]});
      check_returns_shape(denoised, x_, "a post-CFG function", "CfgGuider");
    }
    return denoised;
  }

  const ModelPatcher& model_;
  const Conditionings& prompts_;
  const CfgGuiderOptions& options_;
  RunContext& run_;
  StepContext& step_;
  EvaluationReport& report_;
  const torch::Tensor& x_;
  // For each post-CFG function: the prediction of its early rows, or undefined.
  std::vector<torch::Tensor> early_;
};

// Whether a hook that is active in this evaluation has no site yet. An idle one needs none.
bool has_open_site(const ModelPatcher& model, const StepContext& step) {
  const auto& hooks = model.attention_hooks();
  return std::any_of(hooks.begin(), hooks.end(), [&](const InstalledHook& hook) {
    return hook.site.empty() && (!hook.options.active || hook.options.active(step));
  });
}

const Conditioning& first_active(const std::vector<Conditioning>& positive,
                                 const std::vector<Conditioning>& negative, double sigma) {
  const auto active = [sigma](const auto& cond) { return is_active(cond, sigma); };
  const auto found = std::find_if(positive.begin(), positive.end(), active);
  return found != positive.end() ? *found : *std::find_if(negative.begin(), negative.end(), active);
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

std::int64_t GuiderReport::filler_rows() const {
  std::int64_t sum = 0;
  for (const auto& evaluation : evaluations) sum += evaluation.filler_rows;
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
  options_.cfg_window = in_sigmas(options_.cfg_window, model_.model_sampling(), "CfgGuider");
  prompts_.positive = on_device(std::move(positive), model_.unet().device());
  prompts_.negative = on_device(std::move(negative), model_.unet().device());
  report_.sites = model_.site_choices();
}

void CfgGuider::begin_run(std::vector<double> sigmas) {
  check_sigmas(sigmas);
  sigmas_ = std::move(sigmas);
  report_.evaluations.clear();
  run_ = {};
}

torch::Tensor CfgGuider::operator()(const torch::Tensor& x, double sigma) {
  return evaluate(x, sigma, false).denoised;
}

Denoised CfgGuider::predict_both(const torch::Tensor& x, double sigma) {
  return evaluate(x, sigma, true);
}

Denoised CfgGuider::evaluate(const torch::Tensor& x, double sigma, bool keep_uncond) {
  check_evaluation(x, sigma);
  check_steps_are_known(model_, sigmas_);
  const torch::NoGradGuard no_grad;
  StepContext step(sigma, step_of(sigmas_, sigma), x.size(2), x.size(3));
  const auto prompts = changed_prompts(model_, prompts_, step);
  TORCH_CHECK_VALUE(any_active(prompts.positive, sigma) || any_active(prompts.negative, sigma),
                    "[CfgGuider] no conditioning is active at sigma ", sigma, ".");
  EvaluationReport report{.sigma = sigma, .step_index = step.step_index()};

  if (has_open_site(model_, step)) {
    const auto probes =
        model_.decide_sites(x, sigma, first_active(prompts.positive, prompts.negative, sigma));
    report_.sites = model_.site_choices();
    // A probe is one call of one row.
    const auto rows = probes * model_.unet().evaluated_rows({1, x.size(1), x.size(2), x.size(3)});
    report.unet_calls = probes;
    report.unet_rows = rows;
    report.filler_rows = rows - probes;
  }

  auto denoised = Evaluation(model_, prompts, options_, run_, step, report, x).run(keep_uncond);
  report.guidances = step.notes();
  report_.evaluations.push_back(std::move(report));
  return denoised;
}

}  // namespace sag
