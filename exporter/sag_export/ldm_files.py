"""What checkpoints in one file hold beside the weights of the networks, and the other prefixes that
some programs write.

Each entry says in a word where it is from. A `*` at the end stands for any rest.
"""

# Of every file.
UNNEEDED = (
    # LDM: the mean of the weights over the training.
    "model_ema.*",
    # LDM's DDPM: the table of noise levels, and what follows from it.
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    # LDM's DDPM: weights of the loss.
    "lvlb_weights",
    "logvar",
    # Dreambooth, from the trainer of textual inversion.
    "embedding_manager.*",
    # SDXL's trainer (sgm).
    "denoiser.sigmas",
    # ComfyUI: markers of what the UNet predicts, which are read before.
    "v_pred",
    "ztsnr",
    "edm_vpred.sigma_max",
    "edm_vpred.sigma_min",
    "edm_mean",
    "edm_std",
)

VAE_UNNEEDED = (
    # LDM: the discriminator and LPIPS.
    "first_stage_model.loss.*",
    # LDM: files of a VAE alone.
    "first_stage_model.model_ema.*",
)
# diffusers' script of old kept diffusers' names of the attention.
VAE_SPELLINGS = tuple(
    (f"first_stage_model.{part}.mid.attn_1.{ldm}.", f"first_stage_model.{part}.mid.attn_1.{own}.")
    for part in ("encoder", "decoder")
    for ldm, own in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
)

# Below a CLIPTextModel's prefix: one of OpenAI's, with transformers' names.
CLIP_UNNEEDED = (
    # transformers: 0, 1, 2, ...
    "text_model.embeddings.position_ids",
    # NovelAI's spelling of it.
    "embeddings.position_ids",
    # ComfyUI: a matrix of ones on the diagonal.
    "text_projection.weight",
    # transformers: of a whole CLIPModel (sd.cpp).
    "logit_scale",
    "visual_projection.weight",
    "vision_model.*",
)
# Beside it, in the module that holds it: ComfyUI.
CLIP_OWNER_UNNEEDED = ("logit_scale", "text_projection")

# Below the prefix of an OpenCLIP model.
OPEN_CLIP_UNNEEDED = (
    # OpenCLIP: the temperature of its training.
    "logit_scale",
    # OpenCLIP of old: a mask that is made again.
    "attn_mask",
    # ComfyUI: 0, 1, 2, ...
    "transformer.text_model.embeddings.position_ids",
)
# Of one whose pooled text is not used.
PROJECTION_UNNEEDED = ("text_projection", "text_projection.weight")


def clip_unneeded(prefix):
    owner = prefix.rpartition(".")[0]
    return [f"{prefix}.{name}" for name in CLIP_UNNEEDED] + [
        f"{owner}.{name}" for name in CLIP_OWNER_UNNEEDED
    ]


def open_clip_unneeded(prefix, layers, projected):
    """`layers`: how many are used. The file of Stable Diffusion 2 has one more."""
    names = OPEN_CLIP_UNNEEDED
    if not projected:
        names += (*PROJECTION_UNNEEDED, f"transformer.resblocks.{layers}.*")
    return [f"{prefix}.{name}" for name in names]
