#include "watched_tokens.h"

#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

namespace sag {

WatchedTokens watched_tokens(const AttentionCall& call, const Pass& pass, const RowGroup& rows,
                             const PictureTokens& where) {
  const bool unfused = call.probabilities.defined();
  const auto q = pass.select(rows, unfused ? call.probabilities : call.q);
  const auto queries = q.size(2), keys = unfused ? q.size(3) : pass.select(rows, call.k).size(2);
  const auto range = find_picture_tokens(keys, pass.height, pass.width, where);
  if (range && queries == keys) return {*range, *range};
  // Some attentions have further keys, but no queries, beside the picture's.
  const bool others = where.before != 0 || where.after != 0;
  if (range && others && queries == range->count) return {{0, queries}, *range};

  WatchedTokens none;
  const auto size = c10::str(pass.height, " x ", pass.width);
  if (queries != keys)
    none.fault = c10::str(
        "the attention of the site is not self-attention: it has ", queries, " queries and ", keys,
        " keys",
        keys > queries ? " (if the picture's are among them, the option tokens says which)" : "");
  else if (others || where.reduction != 0)
    none.fault = c10::str("the attention of the site has ", keys,
                          " tokens, and what the option tokens says of them is no grid of the ",
                          size, " latent");
  else
    none.fault = c10::str("the attention of the site has ", keys, " tokens, no grid of the ", size,
                          " latent: the option tokens says which are the picture's");
  return none;
}

}  // namespace sag
