// The map of one uncond row, beside the attention over two rows (uncond and cond) that the UNet
// computes anyway, and beside the naive form.
//
//   attention_map_benchmark --benchmark_filter=sdxl --benchmark_format=json

#include <cmath>
#include <string>

#include "device.h"
#include "sag/attention_map.h"

namespace {

using sag::bench::measure;

struct Heads {
  const char* name;
  std::int64_t heads, head_dim;
};

// [rows, heads, tokens, head_dim], strided as UNets hand it on.
torch::Tensor vectors(std::int64_t rows, const Heads& heads, std::int64_t tokens,
                      torch::Device device, torch::ScalarType dtype) {
  return torch::randn({rows, tokens, heads.heads, heads.head_dim}, device)
      .to(dtype)
      .transpose(1, 2);
}

torch::Tensor naive_attention_map(const torch::Tensor& q, const torch::Tensor& k) {
  const auto scale = 1 / std::sqrt(static_cast<double>(q.size(3)));
  return torch::matmul(q * scale, k.transpose(-1, -2)).softmax(-1, torch::kFloat).mean(1).sum(1);
}

void add_size(const Heads& heads, std::int64_t tokens, torch::Device device,
              torch::ScalarType dtype) {
  const auto add = [&](const std::string& what, std::int64_t rows, auto function) {
    const auto name = what + "/" + heads.name + "/" + std::to_string(tokens) + "/" + device.str() +
                      "/" + torch::toString(dtype);
    benchmark::RegisterBenchmark(name.c_str(),
                                 [=](benchmark::State& state) {
                                   const auto q = vectors(rows, heads, tokens, device, dtype),
                                              k = vectors(rows, heads, tokens, device, dtype),
                                              v = vectors(rows, heads, tokens, device, dtype);
                                   measure(state, device, [&] { function(q, k, v); });
                                 })
        ->UseManualTime()
        ->Unit(benchmark::kMillisecond);
  };

  add("attention_map", 1,
      [](const auto& q, const auto& k, const auto&) { return sag::attention_map(q, k); });
  add("sdpa_of_2_rows", 2, [](const auto& q, const auto& k, const auto& v) {
    return torch::scaled_dot_product_attention(q, k, v);
  });
  const auto naive_bytes = heads.heads * tokens * tokens * 10;  // scores, weights in fp32, and more
  if (naive_bytes < std::int64_t{64} << 30)
    add("naive_attention_map", 1,
        [](const auto& q, const auto& k, const auto&) { return naive_attention_map(q, k); });
}

}  // namespace

int main(int argc, char** argv) {
  const Heads sd15 = {"sd15", 8, 160}, sdxl = {"sdxl", 20, 64};
  for (const auto& heads : {sd15, sdxl}) {
    for (const std::int64_t tokens : {64, 1024, 4096})
      add_size(heads, tokens, torch::kCPU, torch::kFloat);
    if (!torch::cuda::is_available()) continue;
    for (const auto dtype : {torch::kHalf, torch::kBFloat16, torch::kFloat})
      for (const std::int64_t tokens : {64, 1024, 4096, 16384})
        add_size(heads, tokens, torch::kCUDA, dtype);
  }
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 1;
  benchmark::RunSpecifiedBenchmarks();
  benchmark::Shutdown();
}
