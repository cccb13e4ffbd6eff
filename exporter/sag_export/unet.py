"""diffusers' UNets, with the arguments that sag calls them with."""

import torch

from sag_export.mistake import Mistake
from sag_export.network import Network

# Original height and width, top and left crop, target height and width.
TIME_IDS = 6


class PlainUNet(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timesteps):
        return self.unet(x, timesteps, return_dict=False)[0]


class TextUNet(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, x, timesteps, context):
        return self.unet(x, timesteps, context, return_dict=False)[0]


class TextAndSizeUNet(torch.nn.Module):
    """SDXL's: y is the pooled text, followed by the six numbers of the size."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.pooled = pooled_width(unet.config)

    def forward(self, x, timesteps, context, y):
        added = {"text_embeds": y[:, : self.pooled], "time_ids": y[:, self.pooled :]}
        return self.unet(x, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]


def pooled_width(config):
    return config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim


def wrap(unet, tokens=77):
    """The Network of a UNet2DConditionModel or UNet2DModel that check_supported has accepted."""
    config = unet.config
    side = config.sample_size or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    halvings = 2 ** (len(config.block_out_channels) - 1)
    if type(unet).__name__ == "UNet2DModel":
        shape = (
            config.in_channels,
            *(max(side // halvings, 1) * halvings for side in (height, width)),
        )
        return Network(
            PlainUNet(unet).eval(), shape, None, None, multiple=halvings, fastest_multiple=halvings
        )
    shape = (config.in_channels, height, width)
    context = (tokens, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        features = pooled_width(config) + TIME_IDS
        return Network(
            TextAndSizeUNet(unet).eval(), shape, context, features, fastest_multiple=halvings
        )
    return Network(TextUNet(unet).eval(), shape, context, None, fastest_multiple=halvings)


def check_supported(config):
    """Throws Mistake for UNets that take more than sag can give. `config`: what config.json holds.
    It is checked before gigabytes are read."""
    kind = config.get("_class_name")
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise Mistake(
            f"The network must be a UNet2DConditionModel or UNet2DModel, got {kind}; export others "
            "as MODULE:FACTORY."
        )
    channels = [
        config.get(key, 4 if kind == "UNet2DConditionModel" else 3)
        for key in ("in_channels", "out_channels")
    ]
    if channels[0] != channels[1]:
        raise Mistake(
            f"The UNet must return as many channels as it takes, but takes {channels[0]} and "
            f"returns {channels[1]}: networks for inpainting, depth or a learned variance do not "
            "fit."
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise Mistake(
                f'The UNet must take text alone, but its config.json has "{key}": {config[key]!r}.'
            )
    if config.get("time_cond_proj_dim") is not None:
        raise Mistake(
            "The UNet must leave guidance to the sampler, but its config.json has "
            f'"time_cond_proj_dim": {config["time_cond_proj_dim"]!r}: guidance was distilled into '
            "it, and the scale of the guidance is a further input."
        )
    if not isinstance(config.get("cross_attention_dim", 1280), int):
        raise Mistake(
            'The UNet\'s "cross_attention_dim" must be one number, '
            f"got {config['cross_attention_dim']!r}."
        )
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise Mistake(
            'The UNet\'s "addition_embed_type" must be absent or "text_time", '
            f"got {config['addition_embed_type']!r}."
        )
    sizes = [
        config.get(key)
        for key in ("projection_class_embeddings_input_dim", "addition_time_embed_dim")
    ]
    if config.get("addition_embed_type") and (None in sizes or sizes[0] <= TIME_IDS * sizes[1]):
        raise Mistake(
            "The UNet's size embedding must take six numbers and the pooled text, as SDXL's does."
        )
