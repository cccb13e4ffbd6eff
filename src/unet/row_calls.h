#pragma once

#include <cstdint>
#include <functional>

#include "sag/unet.h"

namespace sag {

/// Runs one call of a UNet as calls of exactly `rows` rows, one after the other, and returns the
/// rows that were asked for. The last call is filled up with copies of its last row. Each call runs
/// under the hooks of the current scope with a pass of its own rows; those that fill it up belong
/// to an owner that no guidance knows, "filler".
torch::Tensor run_in_calls_of(std::int64_t rows, const UNetInput& input,
                              const std::function<torch::Tensor(const UNetInput&)>& call);

/// Returns how many rows these calls have together.
std::int64_t rows_in_calls_of(std::int64_t rows, std::int64_t asked);

/// Whether a UNet that works with any number of rows would give these rows: `got` and `expected`
/// differ by no more than rounding for another size of batch. True where `expected` has no numbers
/// to compare.
bool same_rows(const torch::Tensor& got, const torch::Tensor& expected, torch::ScalarType dtype);

/// Returns the inputs with noise added to all floating ones but the timesteps. It is the same every
/// time and another in every row, so that rows that get mixed show, whichever input mixes them.
/// Draws from no generator of the process.
UNetInput with_noise(const UNetInput& input);

}  // namespace sag
