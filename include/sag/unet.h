#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <torch/types.h>

#include "sag/attention_hook.h"
#include "sag/export.h"

namespace sag {

/// The arguments of one UNet call, rows first.
struct UNetInput {
  /// [rows, channels, height, width], scaled for the network, in the UNet's dtype: the latent, and
  /// the channels of `Conditioning::concat` after it.
  torch::Tensor x = {};
  /// [rows] fp32. A file may want them in another form: see `TorchScriptUNet`.
  torch::Tensor timesteps = {};
  /// [rows, tokens, width], or undefined.
  torch::Tensor context = {};
  /// [rows, features], or undefined.
  torch::Tensor y = {};
  /// By argument name, each [rows, …]; "argument.key" and "argument.0" for entries of a dict or
  /// list.
  std::map<std::string, torch::Tensor> extra = {};
};

/// One attention of a UNet that can be hooked.
struct AttentionSiteInfo {
  /// ComfyUI's name where it is known ("middle.0.0"), else the path.
  std::string name = {};
  /// Dotted module path; empty if there is none (frozen files, UNets in C++).
  std::string path = {};
  /// Place in the order of execution, counting self- and cross-attention from 0; -1: unknown.
  std::int64_t ordinal = -1;
};

/// A noise-predicting network. One object may be used from several threads, which is why `forward`
/// is const. That of a torch::nn module is not: keep the module as a `mutable` member (see
/// examples/patches.cpp), and do not let its forward write to members.
class SAG_API UNet {
 public:
  virtual ~UNet();
  /// Returns the raw network output, [rows, channels, height, width], with the latent's channels.
  /// Must not write to its inputs, and must return a tensor that its next call does not overwrite.
  virtual torch::Tensor forward(const UNetInput& input) const = 0;
  /// Returns the self-attentions that hooks can be set on, in order of execution.
  virtual std::vector<AttentionSiteInfo> attention_sites() const = 0;
  /// Returns the cross-attentions that hooks can be set on, in order of execution: all that read
  /// `UNetInput::context`, which nothing else reads, or none where this is not known. Their names
  /// are those of the self-attentions beside them ("middle.0.0"), and their paths end with attn2.
  /// Each needs a path. None, unless a UNet says otherwise.
  virtual std::vector<AttentionSiteInfo> cross_attention_sites() const;
  /// Returns the transformer blocks that hooks can be set on, in order of execution: the path of
  /// each, and as name that of its first self-attention ("middle.0.0"), else the path. None, unless
  /// a UNet says otherwise.
  virtual std::vector<AttentionSiteInfo> block_sites() const;
  /// Returns a sentence for errors about sites: why one may be missing and how to get it. Empty:
  /// none can be missing.
  virtual std::string note_on_sites() const;
  /// The most rows that one call may have; 0: as many as fit into memory. `calc_cond_batch`
  /// respects it.
  virtual std::int64_t max_rows() const;
  /// How many rows the network computes in a call with an x of these sizes: more than x has where
  /// its file takes only some numbers of rows, and `forward` fills the call up with copies that
  /// nobody sees. The channels do not count.
  virtual std::int64_t evaluated_rows(c10::IntArrayRef x) const;
  /// The device of the weights, where inputs are expected.
  virtual torch::Device device() const = 0;
  /// The dtype of x, context, y and floating extra inputs.
  virtual torch::ScalarType dtype() const = 0;
};

/// Returns the UNet's own name of a site, which may be given by name, path or "#ordinal": what
/// `InstalledHook::site` holds. It is the name, or the path where several sites share the name.
/// Throws ValueError, with the list of sites, when there is no such site or more than one, and for
/// "middle" where only a probe can find it.
SAG_API std::string resolve_attention_site(const UNet& unet, const AttentionSite& site);

/// The sizes that an attention works on; all 0 if it did not run.
struct AttentionSiteShape {
  /// Which one.
  AttentionSiteInfo site = {};
  /// Number of heads.
  std::int64_t heads = 0;
  /// Number of query tokens.
  std::int64_t tokens = 0;
  /// Number of key tokens.
  std::int64_t key_tokens = 0;
  /// Width of a head.
  std::int64_t head_dim = 0;
};

/// Runs the UNet once, with hooks on all its self-attentions, and returns what each worked on, in
/// the order of `UNet::attention_sites`: a way to recognize the sites of files without names.
SAG_API std::vector<AttentionSiteShape> probe_attention_sites(const UNet& unet,
                                                              const UNetInput& input);
/// The same for all its cross-attentions, in the order of `UNet::cross_attention_sites`.
SAG_API std::vector<AttentionSiteShape> probe_cross_attention_sites(const UNet& unet,
                                                                    const UNetInput& input);

/// The self-attention that was chosen for a hook, and why.
struct SiteChoice {
  /// What was asked for, "middle" or a name.
  std::string asked = {};
  /// The UNet's own name of what was chosen; empty: not decided yet.
  std::string site = {};
  /// "it was named", "mid is a part of its path", "it has the fewest tokens, 64", …
  std::string reason = {};
};

/// Finds the self-attention of the middle block by names: the one called "middle.0.0", as LDM's and
/// diffusers' are; else the only one with mid, middle, middle_block, mid_block, mid_attn or
/// bottleneck as a part of its path; else the only one that there is. Returns nullopt when names do
/// not decide. Throws ValueError, with the list of sites, when there are no sites, or several with
/// such a part, and when names do not decide in a UNet that lists only some of its sites (a
/// compiled package).
SAG_API std::optional<SiteChoice> find_middle_attention(const UNet& unet);

/// Finds it by a probe: the only self-attention with the fewest tokens. Throws ValueError, with the
/// list of sites and tokens, when several have the fewest or none ran.
SAG_API SiteChoice find_middle_attention(std::span<const AttentionSiteShape> probed);

}  // namespace sag
