"""The names that checkpoints in one file give to the parameters of diffusers' networks.

Such files (Stable Diffusion 1.x, 2.x and XL, and what was made from them) keep the names of the
program that trained them, latent-diffusion (LDM), and of OpenCLIP. A name here is what the file
calls a parameter, and what to do with it.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Stored:
    """A parameter as a file holds it."""

    key: str
    # These rows of it, first and one past the last; () all of them.
    rows: tuple[int, ...] = ()
    # Its two dimensions are swapped.
    transposed: bool = False
    # Dimensions whose size the file decides: how many channels a UNet takes.
    free: tuple[int, ...] = ()
    # Other ways in which files hold it.
    also: tuple["Stored", ...] = ()


RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
UNET = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "class_embedding.linear_1": "label_emb.0.0",
    "class_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}


def renamed(name, table):
    """With the part of `table` that the name begins with in place of that part."""
    for part, other in table.items():
        if name == part or name.startswith(f"{part}."):
            return other + name[len(part) :]
    return name


def unet_name(name, layers):
    """What LDM calls a parameter of a UNet2DConditionModel with so many layers a block."""
    found = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if found:
        side, block, kind, number, rest = found.groups()
        return unet_block_name(side, int(block), kind, int(number), rest, layers)
    if name.startswith("mid_block."):
        place, rest = re.fullmatch(r"mid_block\.(\w+\.\d+)\.(.+)", name).groups()
        return f"middle_block.{MIDDLE[place]}.{renamed(rest, RESNET)}"
    return renamed(name, UNET)


def unet_block_name(side, block, kind, number, rest, layers):
    # Input block 0 is the first convolution; then each block is its layers and a downsampler. An
    # output block has one layer more, and its last one has the upsampler.
    if side == "down":
        first = 1 + block * (layers + 1)
        blocks = f"input_blocks.{first + (layers if kind == 'downsamplers' else number)}"
    else:
        first = block * (layers + 1)
        blocks = f"output_blocks.{first + (layers if kind == 'upsamplers' else number)}"
    if kind == "resnets":
        return f"{blocks}.0.{renamed(rest, RESNET)}"
    if kind == "attentions":
        return f"{blocks}.1.{rest}"
    if kind == "downsamplers":
        return f"{blocks}.0.op.{rest.removeprefix('conv.')}"
    return f"{blocks}.UPSAMPLER.{rest}"


def unet_names(unet):
    """The module's parameter -> Stored."""
    layers = unet.config.layers_per_block
    names = {name: unet_name(name, layers) for name, _ in unet.named_parameters()}
    used = set(names.values())

    def placed(name):
        # After the attention where there is one.
        block = name.partition(".UPSAMPLER.")[0]
        has_attention = any(other.startswith(f"{block}.1.") for other in used)
        return name.replace("UPSAMPLER", "2" if has_attention else "1")

    stored = {
        name: Stored(f"model.diffusion_model.{placed(other)}") for name, other in names.items()
    }
    channels = "conv_in.weight"
    return stored | {channels: dataclasses.replace(stored[channels], free=(1,))}


VAE_RESNET = {"conv_shortcut": "nin_shortcut"}
VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
VAE_MIDDLE = {"resnets.0": "block_1", "attentions.0": "attn_1", "resnets.1": "block_2"}


def vae_name(name, blocks):
    """What LDM calls a parameter of an AutoencoderKL with so many blocks a side."""
    name = name.replace("conv_norm_out", "norm_out")
    found = re.fullmatch(r"(encoder|decoder)\.mid_block\.(\w+\.\d+)\.(.+)", name)
    if found:
        part, place, rest = found.groups()
        table = VAE_ATTENTION if place.startswith("attentions") else VAE_RESNET
        return f"{part}.mid.{VAE_MIDDLE[place]}.{renamed(rest, table)}"
    found = re.fullmatch(r"(encoder|decoder)\.(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", name)
    if not found:
        return name
    part, side, block, kind, number, rest = found.groups()
    # LDM counts from the large pictures to the small ones, in the decoder too.
    block = int(block) if side == "down" else blocks - 1 - int(block)
    if kind == "resnets":
        return f"{part}.{side}.{block}.block.{number}.{renamed(rest, VAE_RESNET)}"
    return f"{part}.{side}.{block}.{kind.removesuffix('rs')}.{rest}"


def vae_names(vae):
    blocks = len(vae.config.block_out_channels)
    return {
        name: Stored(f"first_stage_model.{vae_name(name, blocks)}")
        for name, _ in vae.named_parameters()
    }


def clip_names(model, prefix):
    """Of a CLIPTextModel that the file holds as transformers names it."""
    return {name: Stored(f"{prefix}.{name}") for name, _ in model.named_parameters()}


OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
}
OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def open_clip_stored(name, width):
    """A parameter of a CLIPTextModel of this width as OpenCLIP stores it."""
    if name == "text_projection.weight":
        # diffusers' script of old and Playground v2 wrote transformers' own.
        return Stored("text_projection", transposed=True, also=(Stored(name),))
    name = name.removeprefix("text_model.")
    found = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)", name)
    if not found:
        return Stored(renamed(name, OPEN_CLIP))
    layer, rest = found.groups()
    layer = f"transformer.resblocks.{layer}"
    projection = re.fullmatch(r"self_attn\.([qkv])_proj\.(weight|bias)", rest)
    if not projection:
        return Stored(f"{layer}.{renamed(rest, OPEN_CLIP_LAYER)}")
    part = "qkv".index(projection[1])
    return Stored(f"{layer}.attn.in_proj_{projection[2]}", (part * width, (part + 1) * width))


def open_clip_names(model, prefix):
    """Of a CLIPTextModel, with projection or without, that the file holds as OpenCLIP names it."""
    names = {}
    for name, _ in model.named_parameters():
        stored = open_clip_stored(name, model.config.hidden_size)
        names[name] = prefixed(stored, prefix)
    return names


def prefixed(stored, prefix):
    also = tuple(prefixed(other, prefix) for other in stored.also)
    return dataclasses.replace(stored, key=f"{prefix}.{stored.key}", also=also)
