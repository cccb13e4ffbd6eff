"""What can be exported: the folder of a diffusers pipeline, the folder of a UNet, or a module that
a function of the user makes."""

import dataclasses
import importlib
import os
import pathlib
import sys
from typing import Any

import torch

from sag_export import description, text, unet
from sag_export.mistake import Mistake
from sag_export.network import Concat, Network, first_line
from sag_export.no_source import why_not
from sag_export.vae import Scale
from sag_export.weight_files import check_variant, read_json
from sag_export.weights import check_module, load_part


@dataclasses.dataclass
class Source:
    name: str
    network: Network
    # The prediction and its constants, as in model.json.
    prediction: dict[str, Any]
    # For prompts and pictures: modules in fp32 on the CPU. Without them the UNet is exported alone.
    vae: torch.nn.Module | None = None
    tokenizers: tuple = ()
    text_models: tuple = ()


def read_unet_config(folder):
    config = read_json(pathlib.Path(folder) / "config.json")
    unet.check_supported(config)
    return config


def load_unet(folder, options):
    import diffusers

    kind = getattr(diffusers, read_unet_config(folder)["_class_name"])
    return load_part(kind, folder, options.torch_dtype, options).to(options.device)


def load_tokenizer(folder):
    import transformers

    try:
        return transformers.CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    # A damaged file may raise anything.
    except Exception as error:
        raise Mistake(
            f'"{folder}" cannot be read as CLIP\'s tokenizer: {first_line(error)}'
        ) from error


def from_unet_folder(folder, options):
    # An unsupported network is refused before an option is asked for.
    concat = unet.concat_kind(read_unet_config(folder), options.concat)
    if options.prediction is None:
        raise Mistake(
            "--prediction is needed: the folder of a UNet does not say what the network predicts; "
            "the folder of its pipeline does."
        )
    check_variant([(folder, "diffusers")], options.variant)
    network = unet.wrap(load_unet(folder, options))
    fill_concat(network, concat, None)
    return Source(folder.resolve().name, network, {"prediction": options.prediction})


def fill_concat(network, kind, vae, edits_scaled=False):
    """Says what fills the channels of Network.concat. `vae`: of the pipeline, if it is exported.
    edits_scaled: whether an editing network sees the picture's latent as it draws latents."""
    if kind is None:
        return
    if kind == "edit" and vae is None:
        raise Mistake(
            "A UNet that edits pictures needs its pipeline's VAE, which says how the picture's "
            f"latent is scaled: export the whole pipeline, or use --concat "
            f"{network.concat.channels} and give sag-sample a tensor."
        )
    network.concat.kind = kind
    if kind == "edit" and not edits_scaled:
        network.concat.scale = Scale(vae.config).plain_factor()


def from_pipeline(folder, options):
    index = read_json(folder / "model_index.json")
    check_has_unet(folder, index)
    concat = unet.concat_kind(
        read_unet_config(folder / "unet"), options.concat, index.get("_class_name", "")
    )
    parts = {
        key: value[1]
        for key, value in index.items()
        if isinstance(value, list) and len(value) == 2 and value[1]
    }
    prediction = {"prediction": options.prediction}
    if "scheduler" in parts:
        config = read_json(folder / "scheduler" / "scheduler_config.json")
        prediction = description.from_scheduler(config, options.note, options.prediction)
    elif options.prediction is None:
        raise Mistake(
            f'"{folder}" has no scheduler that says what the network predicts; give --prediction.'
        )
    source = Source(folder.resolve().name, None, prediction)
    # Before gigabytes are read.
    check_variant(weight_folders(folder, parts, options.unet_only), options.variant)
    if not options.unet_only:
        add_texts(source, folder, parts, options)
        add_vae(source, folder, parts, options)
    tokens = (
        text.tokens_of(source.tokenizers[0], source.text_models[0]) if source.text_models else 77
    )
    source.network = unet.wrap(load_unet(folder / "unet", options), tokens)
    check_parts_fit(source)
    fill_concat(source.network, concat, source.vae, index.get("is_cosxl_edit", False))
    return source


def weight_folders(folder, parts, unet_only):
    """The parts that are read, each with its library."""
    wanted = {"unet": "diffusers"}
    if not unet_only:
        texts = ("text_encoder", "text_encoder_2")
        wanted |= {"vae": "diffusers", "vqvae": "diffusers", **dict.fromkeys(texts, "transformers")}
    return [(folder / key, library) for key, library in wanted.items() if key in parts]


def check_has_unet(folder, index):
    if isinstance(index.get("unet"), list) and index["unet"][1]:
        return
    other = [
        value[1]
        for value in index.values()
        if isinstance(value, list) and value[1] and "Transformer" in value[1]
    ]
    what = f"but a {other[0]}" if other else "in its model_index.json"
    raise Mistake(
        f'"{folder}" has no UNet, {what}; a network of another kind is exported as MODULE:FACTORY.'
    )


def add_texts(source, folder, parts, options):
    import transformers

    wanted = [key for key in ("text_encoder", "text_encoder_2", "text_encoder_3") if key in parts]
    if not wanted:
        return
    kinds = [parts[key] for key in wanted]
    if kinds not in (["CLIPTextModel"], ["CLIPTextModel", "CLIPTextModelWithProjection"]):
        raise Mistake(
            "Only CLIP's text encoders, one or SDXL's two, can be exported, but the pipeline has "
            f"{', '.join(kinds)}; --unet-only exports the UNet, for sag-sample's --cond and "
            "--uncond."
        )
    for key, kind in zip(wanted, kinds, strict=True):
        model = load_part(
            getattr(transformers, kind),
            folder / key,
            torch.float32,
            options,
            attn_implementation="eager",
        )
        if getattr(model.config, "use_attention_mask", False):
            raise Mistake(
                "A text encoder that hides the padding (use_attention_mask) cannot be exported; "
                "try --unet-only."
            )
        source.text_models += (model,)
        tokenizer = folder / key.replace("text_encoder", "tokenizer")
        source.tokenizers += (load_tokenizer(tokenizer),)


def add_vae(source, folder, parts, options):
    import diffusers

    key = next((key for key in ("vae", "vqvae") if key in parts), None)
    if key is None:
        return
    if parts[key] != "AutoencoderKL":
        raise Mistake(
            "Only an AutoencoderKL can be exported as decoder, but the pipeline has a "
            f"{parts[key]}; try --unet-only."
        )
    source.vae = load_part(diffusers.AutoencoderKL, folder / key, torch.float32, options)


def check_parts_fit(source):
    network = source.network
    width = sum(model.config.hidden_size for model in source.text_models)
    if source.text_models and not network.context:
        raise Mistake(
            "The pipeline has a text encoder, but its UNet takes no text; try --unet-only."
        )
    if source.text_models and width != network.context[1]:
        raise Mistake(
            f"The text encoders give {width} numbers a token, but the UNet takes "
            f"{network.context[1]}; try --unet-only."
        )
    if source.text_models and (len(source.text_models) == 2) != (network.features is not None):
        raise Mistake(
            "SDXL's two text encoders and its size embedding belong together, but the pipeline has "
            "only one of them; try --unet-only."
        )
    if (
        network.features
        and source.text_models
        and source.text_models[1].config.projection_dim + unet.TIME_IDS != network.features
    ):
        raise Mistake(
            "The UNet takes the pooled text with other numbers than SDXL's six sizes, as a refiner "
            "does; try --unet-only."
        )
    if network.features and source.text_models and source.vae is None:
        raise Mistake(
            "SDXL's text encoder needs the VAE, to know the picture's size; try --unet-only."
        )
    if source.vae is not None and source.vae.config.latent_channels != network.shape[0]:
        raise Mistake(
            f"The VAE's latents have {source.vae.config.latent_channels} channels, but the UNet's "
            f"have {network.shape[0]}."
        )


def from_factory(spec, options):
    """`spec`: "module:function". The function takes nothing and returns a torch.nn.Module."""
    for name in ("prediction", "sample"):
        if getattr(options, name) is None:
            raise Mistake(f"--{name} is needed to export a module of your own.")
    module = call_factory(spec)
    check_module(spec, module)
    if not any(p.is_floating_point() for p in module.parameters()):
        raise Mistake(f"{spec} must return a module with floating point parameters.")
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if tensor.is_complex():
            raise Mistake(
                f'{spec} has a complex "{name}", which --dtype would spoil: keep it as two real '
                "tensors."
            )
    module = module.to(options.device, options.torch_dtype).eval().requires_grad_(False)
    if any(side % options.multiple for side in options.sample[1:]):
        raise Mistake(
            "--sample must have a height and width that are multiples of --multiple, "
            f"{options.multiple}."
        )
    network = Network(
        module, options.sample, options.context, options.y, options.multiple, options.multiple
    )
    if options.concat is not None:
        latent = options.sample[0]
        channels = {"inpaint": latent + 1, "edit": latent}
        network.concat = Concat(
            channels.get(options.concat, options.concat),
            options.concat if options.concat in channels else None,
        )
    return Source(
        spec.partition(":")[0].rpartition(".")[2], network, {"prediction": options.prediction}
    )


def call_factory(spec):
    module_name, _, function = spec.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        make = getattr(importlib.import_module(module_name), function, None)
        made = None if make is None else make()
    # It is the user's code: it may raise anything.
    except Exception as error:
        raise Mistake(
            f"{spec} cannot be called: {type(error).__name__}: {first_line(error)}"
        ) from error
    if make is None:
        raise Mistake(f"{spec}: {module_name}.py has no {function}.")
    if isinstance(made, torch.jit.ScriptModule):
        raise Mistake(
            f"{spec} is TorchScript already: put its file into a folder with a model.json "
            "(docs/models.md)."
        )
    if not isinstance(made, torch.nn.Module):
        raise Mistake(f"{spec} must return a torch.nn.Module, got {type(made).__name__}.")
    return without_compile(made)


def without_compile(module):
    """The module as it was before torch.compile, whose wrappers cannot be traced."""
    for name, part in list(module.named_children()):
        plain = without_compile(part)
        if plain is not part:
            setattr(module, name, plain)
    # What module.compile() sets.
    module._compiled_call_impl = None
    return module._orig_mod if isinstance(module, torch._dynamo.OptimizedModule) else module


def open_source(options):
    folder = pathlib.Path(options.source)
    if (folder / "model_index.json").is_file():
        source = from_pipeline(folder, options)
    elif (folder / "config.json").is_file():
        source = from_unet_folder(folder, options)
    elif ":" in options.source and not folder.exists():
        source = from_factory(options.source, options)
    else:
        raise Mistake(why_not(options.source))
    if options.sample:
        check_sample(source.network, options.sample)
        source.network.shape = options.sample
    source.prediction = description.with_constants(source.prediction, options.constant)
    return source


def check_sample(network, sample):
    if sample[0] != network.shape[0]:
        raise Mistake(
            f"--sample must have the network's {network.shape[0]} channels, got {sample[0]}."
        )
    if any(side % network.multiple for side in sample[1:]):
        raise Mistake(
            f"--sample must have a height and width that are multiples of {network.multiple} for "
            f"this network, got {sample[1]} x {sample[2]}."
        )
