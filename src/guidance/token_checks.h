#pragma once

#include <string_view>

#include "sag/token_grid.h"

namespace sag {

/// Throws ValueError, naming `function`, unless the counts are at least 0, or one of them is the
/// rest and the reduction is known.
void check_picture_tokens(const PictureTokens& where, std::string_view function);

}  // namespace sag
