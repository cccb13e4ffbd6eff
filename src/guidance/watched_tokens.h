#pragma once

#include <string>

#include "sag/attention_hook.h"
#include "sag/pass.h"
#include "sag/token_grid.h"

namespace sag {

/// The picture's tokens in an attention, or why there are none.
struct WatchedTokens {
  /// Among the queries.
  TokenRange queries = {};
  /// Among the keys; as many.
  TokenRange keys = {};
  /// Empty: there are.
  std::string fault = {};
};

/// Returns which queries and keys of some rows' attention are the picture's. `where`: what the
/// caller of a guidance says of them.
WatchedTokens watched_tokens(const AttentionCall& call, const Pass& pass, const RowGroup& rows,
                             const PictureTokens& where);

/// Why a hook does nothing with a call of its site that has no groups of rows.
constexpr const char* kUnknownRows = "it is not known which rows a call of the site has";

/// Why a guidance does nothing in an evaluation of which its hook saw nothing.
constexpr const char* kSiteDidNotRun = "the site did not run";

}  // namespace sag
