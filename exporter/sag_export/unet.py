"""diffusers' UNets, with the arguments that sag calls them with."""

import torch

from sag_export.mistake import Mistake
from sag_export.network import Concat, Network

# Original height and width, top and left crop, target height and width.
TIME_IDS = 6


# Keys of config.json that may stand together.
TOGETHER = (
    {"class_embed_type", "num_class_embeds"},
    {"addition_embed_type", "time_cond_proj_dim"},
)
# Class embeddings of a vector, which is y.
VECTORS = ("identity", "projection", "simple_projection")


class Wrapped(torch.nn.Module):
    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def call(self, *inputs, **others):
        return self.unet(*inputs, **others, return_dict=False)[0]


class PlainUNet(Wrapped):
    def forward(self, x, timesteps):
        return self.call(x, timesteps)


class PlainClassUNet(Wrapped):
    def forward(self, x, timesteps, class_labels):
        return self.call(x, timesteps, class_labels)


class PlainVectorUNet(Wrapped):
    def forward(self, x, timesteps, y):
        return self.call(x, timesteps, y)


class TextUNet(Wrapped):
    def forward(self, x, timesteps, context):
        return self.call(x, timesteps, context)


class TextAndClassUNet(Wrapped):
    def forward(self, x, timesteps, context, class_labels):
        return self.call(x, timesteps, context, class_labels)


class TextAndVectorUNet(Wrapped):
    def forward(self, x, timesteps, context, y):
        return self.call(x, timesteps, context, y)


class TextAndGuidanceUNet(Wrapped):
    """A latent consistency model."""

    def forward(self, x, timesteps, context, timestep_cond):
        return self.call(x, timesteps, context, timestep_cond=timestep_cond)


class TextAndSizeUNet(Wrapped):
    """SDXL's: y is the pooled text, followed by the numbers of the size."""

    def __init__(self, unet, pooled):
        super().__init__(unet)
        self.pooled = pooled

    def added(self, y):
        return {"text_embeds": y[:, : self.pooled], "time_ids": y[:, self.pooled :]}

    def forward(self, x, timesteps, context, y):
        return self.call(x, timesteps, context, added_cond_kwargs=self.added(y))


class TextSizeAndGuidanceUNet(TextAndSizeUNet):
    def forward(self, x, timesteps, context, y, timestep_cond):
        return self.call(
            x, timesteps, context, timestep_cond=timestep_cond, added_cond_kwargs=self.added(y)
        )


def size_numbers(config):
    """How many numbers of the size y ends with: SDXL's six, or five with the refiner's score. Both
    are embedded with the pooled text, which is as wide as the context of a refiner and narrower
    than that of SDXL."""
    total, each = config.projection_class_embeddings_input_dim, config.addition_time_embed_dim
    return 5 if total - 5 * each == config.cross_attention_dim else TIME_IDS


def pooled_width(config):
    return (
        config.projection_class_embeddings_input_dim
        - size_numbers(config) * config.addition_time_embed_dim
    )


def classes_of(config):
    """What Network.classes says."""
    if config.class_embed_type == "timestep":
        return 0
    return config.num_class_embeds if config.class_embed_type is None else None


def vector_of(config):
    """How many numbers a class embedding of a vector takes; None: there is none."""
    if config.class_embed_type not in VECTORS:
        return None
    if config.class_embed_type == "identity":
        return config.get("time_embedding_dim") or config.block_out_channels[0] * 4
    return config.projection_class_embeddings_input_dim


def wrap(unet, tokens=77):
    """The Network of a UNet2DConditionModel or UNet2DModel that check_supported has accepted."""
    config = unet.config
    side = config.sample_size or 64
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    halvings = 2 ** (len(config.block_out_channels) - 1)
    further = config.in_channels - config.out_channels
    others = {
        "fastest_multiple": halvings,
        "concat": Concat(further) if further else None,
        "classes": classes_of(config),
    }
    vector = vector_of(config)
    if type(unet).__name__ == "UNet2DModel":
        sides = (max(side // halvings, 1) * halvings for side in (height, width))
        labelled = PlainClassUNet if others["classes"] is not None else PlainUNet
        module = (PlainVectorUNet if vector else labelled)(unet)
        shape = (config.out_channels, *sides)
        return Network(module.eval(), shape, None, vector, multiple=halvings, **others)
    shape = (config.out_channels, height, width)
    context = (tokens, config.cross_attention_dim)
    others["guidance"] = config.time_cond_proj_dim
    if config.addition_embed_type == "text_time":
        pooled = pooled_width(config)
        kind = TextSizeAndGuidanceUNet if others["guidance"] else TextAndSizeUNet
        features = pooled + size_numbers(config)
        return Network(kind(unet, pooled).eval(), shape, context, features, **others)
    kind = (
        TextAndVectorUNet
        if vector
        else TextAndClassUNet
        if others["classes"] is not None
        else TextAndGuidanceUNet
        if others["guidance"]
        else TextUNet
    )
    return Network(kind(unet).eval(), shape, context, vector, **others)


def concat_kind(config, given, pipeline=""):
    """What the further channels of a UNet are: "inpaint", "edit", or None for a tensor of the
    user's or if there are none. Throws Mistake when it is not known.

    given: --concat. pipeline: the class that model_index.json names."""
    out = config.get("out_channels", 4)
    further = config.get("in_channels", out) - out
    needed = {"inpaint": out + 1, "edit": out}
    if given is not None:
        if further != needed.get(given, given):
            raise Mistake(
                f"--concat {given} must fit the UNet, which takes {further} channels beside the "
                f"{out} of the latent."
            )
        return given if given in needed else None
    if not further:
        return None
    # Others have as many channels, in another order: PaintByExample's mask comes last.
    for kind, name in (("inpaint", "Inpaint"), ("edit", "InstructPix2Pix")):
        if further == needed[kind] and name in pipeline:
            return kind
    meanings = {
        "inpaint": "a mask, then the latent of the picture without what is repainted",
        "edit": "the latent of a picture",
    }
    fitting = [
        f"--concat {kind} ({meaning})"
        for kind, meaning in meanings.items()
        if further == needed[kind]
    ]
    raise Mistake(
        f"The UNet takes {further} channels beside the {out} of the latent, and it is not known "
        f"what they are: say it with {', or '.join([*fitting, f'--concat {further}'])} for a "
        "tensor of your own, if they stand after the latent's."
    )


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
    if channels[0] < channels[1]:
        raise Mistake(
            f"The UNet must not return more channels than it takes, but takes {channels[0]} and "
            f"returns {channels[1]}: networks with a learned variance do not fit."
        )
    for key in ("encoder_hid_dim", "encoder_hid_dim_type"):
        if config.get(key) is not None:
            raise Mistake(
                f'The UNet must take text alone, but its config.json has "{key}": {config[key]!r}.'
            )
    known = (None, "timestep", *(VECTORS if kind == "UNet2DConditionModel" else VECTORS[:1]))
    if config.get("class_embed_type") not in known:
        raise Mistake(
            f'The UNet\'s "class_embed_type" must be absent or one of {", ".join(known[1:])}, '
            f"got {config['class_embed_type']!r}."
        )
    kinds = [
        key
        for key in ("class_embed_type", "num_class_embeds", "addition_embed_type")
        if config.get(key) is not None
    ]
    if config.get("time_cond_proj_dim") is not None:
        kinds.append("time_cond_proj_dim")
    if not set(kinds) <= TOGETHER[0] and not set(kinds) <= TOGETHER[1]:
        raise Mistake(
            "The UNet must take classes, or sizes and an embedded scale of guidance, but its "
            f"config.json has {' and '.join(kinds)}."
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
