#pragma once

#include <cstdint>
#include <iosfwd>
#include <optional>
#include <string>
#include <vector>

namespace sag_sample {

/// What the command line says. What it leaves open is empty, and filled from the model directory
/// and the defaults (see settings.h). `…T` stands for tensors: FILE or FILE:KEY.
struct Options {
  // The model.
  std::string model, unet;
  std::optional<std::string> prediction;
  std::optional<double> sigma_data, sigma_min, sigma_max, shift, timestep_multiplier;
  bool zero_terminal_snr = false;
  double latent_scale = 1.0;
  bool list_sites = false;

  // What to draw.
  std::vector<std::string> prompts;
  std::optional<std::string> negative;
  std::int64_t unconditional = 0;
  std::string cond, uncond, cond_y, uncond_y;
  std::optional<std::int64_t> batch;
  std::uint64_t seed = 0;
  std::string noise, latent, image, mask, inpaint_noise;
  std::optional<std::int64_t> channels, height, width;

  // How to sample.
  std::optional<std::string> sampler, schedule;
  std::optional<std::int64_t> steps;
  std::optional<double> cfg, denoise;
  std::optional<double> eta, s_noise;
  std::string sigmas;

  // Self-attention guidance.
  std::optional<double> sag_scale, sag_blur, sag_threshold;
  std::optional<std::int64_t> sag_kernel;
  std::optional<double> sag_start, sag_end, sag_start_percent, sag_end_percent;
  std::int64_t sag_interval = 1;
  bool sag_one_pass = false, no_sag = false, sag_shuffle = false;
  std::optional<std::string> site;

  // Where to compute.
  std::optional<std::string> device, dtype;
  std::optional<std::int64_t> threads;
  std::int64_t max_rows = 16;
  bool tf32 = false, no_cuda_graph = false;
  std::optional<std::string> channels_last;

  // What to write.
  std::string out, save_latent, json;
  bool compare = false, quiet = false;
  std::int64_t columns = 0, zoom = 0;
};

/// Reads the arguments (without the program's name). Returns nothing if they asked for the help,
/// the version or a list of names, which then went to `out`. Throws UsageError.
std::optional<Options> parse_options(const std::vector<std::string>& arguments, std::ostream& out);

}  // namespace sag_sample
