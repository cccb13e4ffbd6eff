#pragma once

// Tensors: for callers with their own UNet and sampler.
#include "sag/attention_map.h"
#include "sag/blur.h"
#include "sag/self_attention_guidance.h"
#include "sag/token_grid.h"

// Patches: for callers with a UNet and a sampler loop.
#include "sag/attention.h"
#include "sag/attention_hook.h"
#include "sag/attention_scope.h"
#include "sag/calc_cond_batch.h"
#include "sag/cfg_functions.h"
#include "sag/cfg_guider.h"
#include "sag/checkpoint.h"
#include "sag/conditioning.h"
#include "sag/cuda_graph_unet.h"
#include "sag/denoised.h"
#include "sag/denoiser.h"
#include "sag/model_patcher.h"
#include "sag/model_sampling.h"
#include "sag/pass.h"
#include "sag/picture_network.h"
#include "sag/run_context.h"
#include "sag/step_context.h"
#include "sag/text_encoder.h"
#include "sag/unet.h"

// Other guidances on the same hooks.
#include "sag/adaptive_projected_guidance.h"
#include "sag/cfg_zero_star.h"
#include "sag/dynamic_thresholding.h"
#include "sag/guidance_window.h"
#include "sag/momentum_guidance.h"
#include "sag/normalized_attention_guidance.h"
#include "sag/perturbed_attention_guidance.h"
#include "sag/rescale_cfg.h"
#include "sag/self_guidance.h"
#include "sag/skip_layer_guidance.h"
#include "sag/smoothed_energy_guidance.h"
#include "sag/token_perturbation_guidance.h"

// Files: for callers with a model file.
#include "sag/aoti_unet.h"
#include "sag/inpaint.h"
#include "sag/noise.h"
#include "sag/run_sampler.h"
#include "sag/safetensors.h"
#include "sag/sample.h"
#include "sag/samplers.h"
#include "sag/schedules.h"
#include "sag/torchscript_unet.h"

#include "sag/version.h"

/// Self-Attention Guidance for diffusion samplers, on LibTorch: everything in the library.
namespace sag {}
