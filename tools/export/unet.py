"""diffusers' UNets, with the arguments that sag calls them with."""
import torch

from export.mistake import Mistake
from export.network import Network

TIME_IDS = 6  # original height and width, top and left crop, target height and width


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
    """SDXL's: y is the pooled text and, behind it, the size's six numbers."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet
        self.pooled = pooled_width(unet.config)

    def forward(self, x, timesteps, context, y):
        added = {"text_embeds": y[:, :self.pooled], "time_ids": y[:, self.pooled:]}
        return self.unet(x, timesteps, context, added_cond_kwargs=added, return_dict=False)[0]


def pooled_width(config):
    return config.projection_class_embeddings_input_dim - TIME_IDS * config.addition_time_embed_dim


def wrap(unet, tokens=77):
    """A Network around a UNet2DConditionModel or UNet2DModel. Throws Mistake for those that take more than sag can give."""
    config = unet.config
    check_supported(unet)
    side = config.sample_size or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    halvings = 2 ** (len(config.block_out_channels) - 1)
    shape = (config.in_channels, height, width)
    if type(unet).__name__ == "UNet2DModel":
        return Network(PlainUNet(unet), shape, None, None, multiple=halvings, fastest_multiple=halvings)
    context = (tokens, config.cross_attention_dim)
    if config.addition_embed_type == "text_time":
        features = pooled_width(config) + TIME_IDS
        return Network(TextAndSizeUNet(unet), shape, context, features, fastest_multiple=halvings)
    return Network(TextUNet(unet), shape, context, None, fastest_multiple=halvings)


def check_supported(unet):
    config, kind = unet.config, type(unet).__name__
    if kind not in ("UNet2DConditionModel", "UNet2DModel"):
        raise Mistake(f"The network must be a UNet2DConditionModel or UNet2DModel, got {kind}; export others as MODULE:FACTORY.")
    if config.in_channels != config.out_channels:
        raise Mistake(
            f"The UNet must return as many channels as it takes, but takes {config.in_channels} and returns {config.out_channels}: "
            "networks for inpainting, depth or a learned variance do not fit."
        )
    for key in ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise Mistake(f'The UNet must take text alone, but its config.json has "{key}": {config[key]!r}.')
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise Mistake(f'The UNet\'s "addition_embed_type" must be absent or "text_time", got {config.addition_embed_type!r}.')
    if not isinstance(config.get("cross_attention_dim", 0), int):
        raise Mistake(f'The UNet\'s "cross_attention_dim" must be one number, got {config.cross_attention_dim!r}.')
    if config.get("addition_embed_type") == "text_time" and pooled_width(config) <= 0:
        raise Mistake("The UNet's size embedding must take six numbers and the pooled text, as SDXL's does.")
