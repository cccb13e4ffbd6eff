#include "sag/samplers.h"

#include <algorithm>
#include <array>

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace sag {
namespace {

constexpr std::array kSamplers = {
    SamplerInfo{.name = "euler", .sample = sample_euler},
    SamplerInfo{.name = "euler_cfg_pp", .sample = sample_euler_cfg_pp, .needs_uncond = true},
    SamplerInfo{.name = "euler_ancestral", .sample = sample_euler_ancestral},
    SamplerInfo{.name = "euler_ancestral_cfg_pp",
                .sample = sample_euler_ancestral_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "heun", .sample = sample_heun},
    SamplerInfo{.name = "heunpp2", .sample = sample_heunpp2},
    SamplerInfo{.name = "dpm_2", .sample = sample_dpm_2, .discards_penultimate_sigma = true},
    SamplerInfo{.name = "dpm_2_ancestral",
                .sample = sample_dpm_2_ancestral,
                .discards_penultimate_sigma = true},
    SamplerInfo{.name = "lms", .sample = sample_lms},
    SamplerInfo{.name = "dpmpp_2s_ancestral", .sample = sample_dpmpp_2s_ancestral},
    SamplerInfo{.name = "dpmpp_2s_ancestral_cfg_pp",
                .sample = sample_dpmpp_2s_ancestral_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "dpmpp_sde", .sample = sample_dpmpp_sde},
    SamplerInfo{.name = "dpmpp_2m", .sample = sample_dpmpp_2m},
    SamplerInfo{.name = "dpmpp_2m_cfg_pp", .sample = sample_dpmpp_2m_cfg_pp, .needs_uncond = true},
    SamplerInfo{.name = "dpmpp_2m_sde", .sample = sample_dpmpp_2m_sde},
    SamplerInfo{.name = "dpmpp_2m_sde_heun", .sample = sample_dpmpp_2m_sde_heun},
    SamplerInfo{.name = "dpmpp_3m_sde", .sample = sample_dpmpp_3m_sde},
    SamplerInfo{.name = "ddpm", .sample = sample_ddpm},
    SamplerInfo{.name = "lcm", .sample = sample_lcm},
    SamplerInfo{.name = "ipndm", .sample = sample_ipndm},
    SamplerInfo{.name = "ipndm_v", .sample = sample_ipndm_v},
    SamplerInfo{.name = "deis", .sample = sample_deis},
    SamplerInfo{.name = "res_multistep", .sample = sample_res_multistep},
    SamplerInfo{.name = "res_multistep_cfg_pp",
                .sample = sample_res_multistep_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "gradient_estimation", .sample = sample_gradient_estimation},
    SamplerInfo{.name = "gradient_estimation_cfg_pp",
                .sample = sample_gradient_estimation_cfg_pp,
                .needs_uncond = true},
    SamplerInfo{.name = "er_sde", .sample = sample_er_sde},
    SamplerInfo{.name = "ddim", .sample = sample_ddim, .keeps_with_noise_of_its_own = true},
    SamplerInfo{.name = "uni_pc",
                .sample = sample_uni_pc,
                .discards_penultimate_sigma = true,
                .end_sigma = 0.001},
    SamplerInfo{.name = "uni_pc_bh2",
                .sample = sample_uni_pc_bh2,
                .discards_penultimate_sigma = true,
                .end_sigma = 0.001},
};

constexpr auto kNames = [] {
  std::array<std::string_view, kSamplers.size()> names;
  for (std::size_t i = 0; i < names.size(); ++i) names[i] = kSamplers[i].name;
  return names;
}();

}  // namespace

std::span<const std::string_view> sampler_names() {
  return kNames;
}

const SamplerInfo& sampler_info(std::string_view name) {
  const auto found = std::find(kNames.begin(), kNames.end(), name);
  TORCH_CHECK_VALUE(found != kNames.end(), "[sampler_info] name must be one of ",
                    c10::Join(", ", kNames), ", got \"", name, "\".");
  return kSamplers[static_cast<std::size_t>(found - kNames.begin())];
}

Sampler get_sampler(std::string_view name) {
  return sampler_info(name).sample;
}

}  // namespace sag
