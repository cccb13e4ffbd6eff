#pragma once

#include <unordered_set>

#include <ATen/core/interned_strings.h>

namespace sag {

/// What nodes of a graph do, as `Node::kind` names it.
using Ops = std::unordered_set<c10::Symbol>;

/// Ops that change how a tensor is stored, and in eval mode not what it holds.
inline const Ops kCasts = {c10::aten::to,      c10::aten::type_as, c10::aten::contiguous,
                           c10::aten::dropout, c10::aten::detach,  c10::aten::clone};

/// Stands after a transformer block, where hooks may change what it returned; its inputs are what
/// the block was given, what it returned, and the block's path.
inline const c10::Symbol kTransformerBlock = c10::Symbol::fromQualString("sag::transformer_block");

}  // namespace sag
