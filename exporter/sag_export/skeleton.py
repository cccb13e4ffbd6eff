"""Skeletons: the networks of a family of checkpoints, as TorchScript without weights. C++ fills
them from a checkpoint in one file.

A skeleton is a model directory. Its archives hold, beside the code, `names.json`: what the
checkpoint calls each parameter, what it may hold that nobody needs, and other spellings of its
names. A parameter has its shape, but all its elements are one zero.
"""

import dataclasses
import json

import torch

from sag_export import archive, description, ldm_files, ldm_names, sites, text, unet, vae
from sag_export.attention import without_fast_path


@dataclasses.dataclass(frozen=True)
class TextModel:
    """A text encoder of a family."""

    # Of transformers' CLIPTextConfig.
    config: dict
    # Whether the file names it as OpenCLIP does, and not as transformers.
    open_clip: bool
    # Its place in the file, and others that some programs write.
    prefix: str
    others: tuple[str, ...] = ()
    # Whether the UNet takes its pooled text.
    projected: bool = False


@dataclasses.dataclass(frozen=True)
class Family:
    """What the checkpoints of a family have in common."""

    name: str
    # Configurations of diffusers' UNet2DConditionModel and AutoencoderKL; None: no VAE.
    unet: dict
    vae: dict | None = None
    # None, one, or SDXL's two.
    text: tuple[TextModel, ...] = ()
    # What the UNet predicts unless the file says otherwise.
    prediction: str = "eps"


VOCABULARY = 49408
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
CLIP_L |= {"num_attention_heads": 12, "projection_dim": 768, "hidden_act": "quick_gelu"}
# OpenCLIP-H without its last layer, which Stable Diffusion 2 does not use.
CLIP_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23}
CLIP_H |= {"num_attention_heads": 16, "projection_dim": 512, "hidden_act": "gelu"}
CLIP_BIG_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32}
CLIP_BIG_G |= {"num_attention_heads": 20, "projection_dim": 1280, "hidden_act": "gelu"}

VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}
# Where the programs that trained them keep the text encoders; sgm's place is SDXL's, too.
SD1_TEXT = ("cond_stage_model.transformer", ("conditioner.embedders.0.transformer",))
SD2_TEXT = ("cond_stage_model.model", ("conditioner.embedders.0.model",))
SDXL_TEXTS = ("conditioner.embedders.0.transformer", "conditioner.embedders.1.model")
# ComfyUI of old.
SD1_OLD = "cond_stage_model.clip_l.transformer"

SD1 = Family(
    "sd1",
    {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    VAE,
    (TextModel(CLIP_L, False, SD1_TEXT[0], (*SD1_TEXT[1], SD1_OLD)),),
)
SD2 = Family(
    "sd2",
    {
        "sample_size": 64,
        "cross_attention_dim": 1024,
        "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    VAE,
    (TextModel(CLIP_H, True, *SD2_TEXT),),
)
SDXL = Family(
    "sdxl",
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    VAE | {"scaling_factor": 0.13025},
    (
        TextModel(CLIP_L, False, SDXL_TEXTS[0]),
        TextModel(CLIP_BIG_G, True, SDXL_TEXTS[1], projected=True),
    ),
)
FAMILIES = {family.name: family for family in (SD1, SD2, SDXL)}

# The noise levels of them all.
TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timesteps": 1000,
    "zero_terminal_snr": False,
}
# Beside the code in an archive.
NAMES = "names.json"
TOKENS = 77


def hollow(module):
    """Gives every parameter the value 0 in all places, in the memory of one number."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                zero = torch.zeros(1).expand(parameter.shape)
                part._parameters[name] = torch.nn.Parameter(zero, requires_grad=False)
        for name, buffer in part._buffers.items():
            # The only one there is; a buffer without values would be traced without a word.
            assert name == "position_ids", name
            part._buffers[name] = torch.arange(buffer.shape[-1])[None]
    return module.eval()


def made(kind, config):
    """A module without memory for its weights."""
    with torch.device("meta"):
        module = kind(config) if not isinstance(config, dict) else kind(**config)
    return hollow(module)


def entry(stored, shape=None):
    """What names.json says about a parameter. A shape belongs to the parameter, so the other ways
    of storing it have none."""
    content = {key: value for key, value in dataclasses.asdict(stored).items() if value}
    if shape is not None:
        content["shape"] = list(shape)
    if stored.also:
        content["also"] = [entry(other) for other in stored.also]
    return content


def names_text(module, names, unneeded=(), spellings=()):
    """names.json. `names`: the path of each parameter of the module -> Stored."""
    shapes = {name: parameter.shape for name, parameter in module.named_parameters()}
    assert sorted(shapes) == sorted(names), set(shapes) ^ set(names)
    content = {
        "parameters": {name: entry(stored, shapes[name]) for name, stored in names.items()},
        "unneeded": list(unneeded),
        "spellings": [list(spelling) for spelling in spellings],
    }
    return json.dumps(content, sort_keys=True)


def unet_names(module):
    """names.json of a wrapped UNet."""
    names = prefixed("unet", ldm_names.unet_names(module.unet))
    return names_text(module, names, ldm_files.UNNEEDED)


def save(module, path, *names):
    """`names`: as names_text takes them."""
    archive.save(module, path, {NAMES: names_text(module, *names)})


def prefixed(prefix, names):
    return {f"{prefix}.{name}": stored for name, stored in names.items()}


@torch.no_grad()
def write_unet(family, path):
    """Returns its Network."""
    from diffusers import UNet2DConditionModel

    network = unet.wrap(made(UNet2DConditionModel, family.unet), TOKENS)
    with without_fast_path():
        example = tuple(network.example(2, *network.small_sizes()[0]).values())
        traced = torch.jit.trace(network.module, example, check_trace=False)
    archive.save(traced, path, {NAMES: unet_names(network.module)})
    return network


@torch.no_grad()
def write_vae(family, folder):
    """Returns how many pixels a cell of the latent has."""
    from diffusers import AutoencoderKL

    whole = made(AutoencoderKL, family.vae)
    factor = vae.factor_of(whole)
    names = prefixed("vae", ldm_names.vae_names(whole))
    for name, module, channels, scale in (
        ("decoder", vae.Decoder(whole), whole.config.latent_channels, 1),
        ("encoder", vae.Encoder(whole), 3, factor),
    ):
        example = torch.randn(1, channels, 6 * scale, 5 * scale)
        traced = torch.jit.trace(module.eval(), example, check_trace=False)
        used = {path: names[path] for path, _ in traced.named_parameters()}
        spellings = [pair for pair in ldm_files.VAE_SPELLINGS if f".{name}." in pair[0]]
        save(traced, folder / f"{name}.ts", used, ldm_files.VAE_UNNEEDED, spellings)
    return factor


def text_module(model):
    """`model`: TextModel."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = {"vocab_size": VOCABULARY, "max_position_embeddings": TOKENS, **model.config}
    # CLIP's last token is the end of the text.
    config.setdefault("eos_token_id", config["vocab_size"] - 1)
    kind = CLIPTextModelWithProjection if model.projected else CLIPTextModel
    return made(kind, CLIPTextConfig(**config, attn_implementation="eager"))


def text_names(model, module):
    if model.open_clip:
        return ldm_names.open_clip_names(module, model.prefix)
    return ldm_names.clip_names(module, model.prefix)


def text_unneeded(model, prefix):
    if model.open_clip:
        layers = model.config["num_hidden_layers"]
        return ldm_files.open_clip_unneeded(prefix, layers, model.projected)
    return ldm_files.clip_unneeded(prefix)


def text_spellings(model):
    """NovelAI leaves out "text_model."; others have another prefix."""
    inside = "." if model.open_clip else ".text_model."
    shorter = [] if model.open_clip else [(model.prefix + inside, f"{model.prefix}.")]
    return shorter + [(model.prefix + inside, other + inside) for other in model.others]


@torch.no_grad()
def write_text_encoder(family, path, tokenizers, factor):
    modules = [text_module(model) for model in family.text]
    if len(modules) == 1:
        encoder, places = text.make_text_encoder(tokenizers[0], modules[0]), ["clip"]
    else:
        pairs = [part for pair in zip(tokenizers, modules, strict=True) for part in pair]
        encoder, places = text.make_text_and_size_encoder(*pairs, factor), ["clip", "clip_2"]
    names, unneeded, spellings = {}, [], []
    for place, model, module in zip(places, family.text, modules, strict=True):
        names |= prefixed(f"{place}.states.model", text_names(model, module))
        for prefix in (model.prefix, *model.others):
            unneeded += text_unneeded(model, prefix)
        spellings += text_spellings(model)
    save(encoder, path, names, unneeded, spellings)


@torch.no_grad()
def write(family, folder, tokenizers):
    """Writes the model directory of a family. `tokenizers`: a CLIPTokenizerFast for each text
    encoder."""
    network = write_unet(family, folder / "unet.ts")
    parts = ["unet"]
    if family.vae:
        factor = write_vae(family, folder)
    if family.text:
        write_text_encoder(family, folder / "text_encoder.ts", tokenizers, factor)
        parts += ["text_encoder"]
    if family.vae:
        parts += ["decoder", "encoder"]
    files = {part: f"{part}.ts" for part in parts}
    found = network.sites()
    site = sites.unique_name(sites.choose([], found)[0], found)
    prediction = {"prediction": family.prediction, **TABLE}
    content = description.model_json(family.name, prediction, network, site, files, 1)
    (folder / "model.json").write_text(content, encoding="utf-8")
