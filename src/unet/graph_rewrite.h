#pragma once

#include <set>
#include <string>

#include <torch/types.h>

#include "attention_nodes.h"

// Edits of a private, flattened graph (see flatten.h). Each leaves a graph that runs.
namespace sag {

/// Puts `replacement` where `node` is, with its metadata. Both have one output.
void replace_node(torch::jit::Node* node, torch::jit::Node* replacement);

/// Replaces a `scaled_dot_product_attention` by `sag::attention` with the same inputs, at `site`,
/// and the last product of an unfused attention by `sag::attention_probabilities`. Where the
/// layer's input is known, `sag::attention_layer` tells the scope before.
void hook_attention(const AttentionNode& attention, const std::string& site,
                    const LayerInput& layer = {});

/// Returns the path of the transformer block that the node stands after; empty: it marks none.
std::string marked_block(const torch::jit::Node* node);

/// Removes `sag::transformer_block` after the blocks that are not in `hooked`, by path.
void leave_blocks(torch::jit::Graph& graph, const std::set<std::string>& hooked);

/// Makes scripted nn.MultiheadAttention and nn.TransformerEncoderLayer take their slow path, step
/// by step: the fast one is a single op, in which no attention can be hooked.
void leave_fast_paths(torch::jit::Graph& graph);

/// Replaces `_convolution`, in which tracing records cuDNN's switches, by convolutions that take
/// the process's switches.
void use_plain_convolutions(torch::jit::Graph& graph);

/// Moves constants to `device`: tensors, and the devices that tracing records. Tensors without
/// dimensions go to the CPU: traced graphs compute shapes with them, and on a GPU each would wait
/// for the device.
void move_constants(torch::jit::Graph& graph, torch::Device device);

/// Stores constant weights of convolutions with channels last.
void constants_to_channels_last(torch::jit::Graph& graph);

/// Replaces views by reshapes: a picture with channels last has no view that merges channels and
/// pixels.
void let_views_copy(torch::jit::Graph& graph);

/// Converts floating constants that are weights, as in frozen files, to `dtype`. Other constants
/// are only ever widened: half precision is too coarse for the frequencies of an embedding.
void convert_constants(torch::jit::Graph& graph, torch::ScalarType dtype);

/// Replaces the half-precision dtype `from` in the recorded arguments of casts and factories by
/// `to`.
void replace_recorded_dtype(torch::jit::Graph& graph, torch::ScalarType from, torch::ScalarType to);

/// Casts what goes into linear layers, convolutions, norms and attention to the dtype of their
/// weights, whatever dtypes the file recorded.
void follow_weights(torch::jit::Graph& graph);

/// Returns the dtype that most elements of constant weights have; nothing if there are none.
std::optional<torch::ScalarType> constant_weights_dtype(torch::jit::Graph& graph);

/// Returns the device of the first constant tensor that has dimensions; nothing if there is none.
std::optional<torch::Device> constants_device(torch::jit::Graph& graph);

}  // namespace sag
