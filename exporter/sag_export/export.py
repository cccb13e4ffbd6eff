"""From the options of the command line to a model directory."""

import sys
import time

import torch

from sag_export import DTYPES, PROGRAM, compiled, compiled_skeleton, description, torchscript
from sag_export import sites as sites_of
from sag_export.mistake import Mistake
from sag_export.model_folder import new_folder
from sag_export.package import bounds
from sag_export.skeleton import FAMILIES
from sag_export.source import open_source

# TorchScriptUNet::load follows the same rule, which docs/performance.md measures.
CHANNELS_LAST_SHARE = 0.05

# Options that a skeleton does not take: the checkpoint says what they would.
OF_MODELS = ("name", "unet_only", "variant", "prediction", "constant", "sample", "context", "y")


def say(text):
    print(f"{PROGRAM}: {text}", file=sys.stderr, flush=True)


def complete(options):
    """Checks what argparse cannot, and fills in what follows from other options."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda: there is no CUDA device here; --device cpu needs none.")
    options.dtype = options.dtype or ("fp16" if options.device == "cuda" else "fp32")
    options.torch_dtype = getattr(torch, DTYPES[options.dtype])
    options.note = say
    for_packages = (
        options.rows or options.size or options.channels_last != "auto" or options.cross_attention
    )
    if options.format == "torchscript" and for_packages:
        raise Mistake(
            "--rows, --size, --channels-last and --cross-attention are for --format aoti; "
            "TorchScript takes any rows and sizes, and all its attentions can be hooked."
        )
    if options.skeleton:
        check_skeleton_options(options)
        return
    for_modules = options.context or options.y or options.multiple != 1
    if ":" not in options.source and for_modules:
        raise Mistake(
            "--context, --y and --multiple are for MODULE:FACTORY; "
            "the config.json of a UNet says them."
        )
    if ":" in options.source and options.variant:
        raise Mistake("--variant is for folders: MODULE:FACTORY reads its weights itself.")
    if options.y and not options.context:
        raise Mistake(
            "--y needs --context: a forward takes x, timesteps, context and y, in this order."
        )


def check_skeleton_options(options):
    if options.source is not None:
        raise Mistake(
            f'--skeleton stands in place of SOURCE, but "{options.source}" is given, too.'
        )
    if options.format != "aoti":
        raise Mistake("--skeleton needs --format aoti: sag brings the TorchScript ones along.")
    given = [name.replace("_", "-") for name in OF_MODELS if getattr(options, name)]
    if options.multiple != 1:
        given.append("multiple")
    if given:
        raise Mistake(
            f"--{given[0]} is for a model of its own; with --skeleton the family says what the "
            "network is, and the checkpoint the rest."
        )


def default_sizes(network):
    """From half to twice the default latent, in steps that the network takes without a detour."""
    step = network.fastest_multiple

    def around(side):
        return max(side // 2 // step, 1) * step, max(side * 2 // step, 2) * step, step

    return [tuple(map(around, network.shape[1:]))]


def with_multiple(dim, multiple):
    return (*dim, multiple) if isinstance(dim, tuple) and len(dim) == 2 else dim


def check_side(dim, network):
    """Throws Mistake if a package of this network cannot take the dim of --size."""
    if isinstance(dim, tuple):
        low, high, _ = dim
        step = network.fastest_multiple
        if low % step or high % step:
            raise Mistake(
                f"A range of --size must begin and end with multiples of {step} for this network, "
                f"got {low}-{high}."
            )
    elif dim % network.multiple:
        raise Mistake(
            f"A --size must be a multiple of {network.multiple} for this network, got {dim}."
        )


def sizes_of(options, network):
    """--size as pairs of dims that the network takes."""
    if not options.size:
        return default_sizes(network)
    step = network.fastest_multiple
    sizes = [tuple(with_multiple(dim, step) for dim in pair) for pair in options.size]
    for pair in sizes:
        for dim in pair:
            check_side(dim, network)
    return sizes


def wants_channels_last(options, network):
    if options.channels_last != "auto":
        return options.channels_last == "on"
    half = options.dtype != "fp32"
    share = network.convolution_share()
    return options.device == "cuda" and half and share >= CHANNELS_LAST_SHARE


def rows_and_sizes(network, options):
    """What to compile the network for, which gets its layout here."""
    sizes = sizes_of(options, network)
    rows = options.rows or [(1, 8)]
    if all(bounds(dim)[0] > 1 for dim in rows):
        say(
            "note: no package takes one row. SAG asks for one in addition to the two of CFG; "
            "--rows 1,2 would serve both"
        )
    if wants_channels_last(options, network):
        network.module.to(memory_format=torch.channels_last)
    return rows, sizes


def marks_of(network, options):
    """What hooks can be set on in the compiled network."""
    sites = sites_of.choose(options.site, network.sites())
    if not options.cross_attention:
        return sites_of.Marks(sites)
    return sites_of.Marks(sites, network.cross_sites())


def write_compiled(network, folder, options):
    """Compiles the UNet. Returns its name and what height and width must be multiples of."""
    rows, sizes = rows_and_sizes(network, options)
    marks = marks_of(network, options)
    name = compiled.write_unet(network, folder, rows, sizes, marks, say)
    network.shape = (network.shape[0], *fitting(network.shape[1:], sizes))
    step = network.fastest_multiple
    sides = [side for pair in sizes for dim in pair for side in compiled.tried(dim)]
    return name, step if all(side % step == 0 for side in sides) else 1


def fitting(latent, sizes):
    """The default latent if a package takes it, else the nearest one of the first package."""

    def nearest(side, dim):
        low, high, multiple = bounds(dim)
        return min(max(side // multiple * multiple, low), high)

    fits = [tuple(map(nearest, latent, pair)) for pair in sizes]
    return latent if latent in fits else fits[0]


def say_unet(network, options):
    millions = sum(p.numel() for p in network.module.parameters()) / 1e6
    say(f"the UNet: {millions:.1f} M parameters, {options.dtype}, {options.format}")


def write_skeleton(family, folder, options):
    """Compiles the UNet of a family without weights."""
    say(f"making the UNet of {family.name} with random weights, to compile and check it with")
    network = compiled_skeleton.random_network(
        family, options.concat, options.device, options.torch_dtype
    )
    network.check()
    marks = marks_of(network, options)
    say_unet(network, options)
    rows, sizes = rows_and_sizes(network, options)
    compiled_skeleton.write(family, network, folder, rows, sizes, marks, say)


def write(source, folder, options):
    network = source.network
    network.check()
    found = network.sites()
    sites = sites_of.choose(options.site, found)
    say_unet(network, options)
    if options.format == "aoti":
        name, multiple = write_compiled(network, folder, options)
    else:
        name, multiple = "unet.ts", network.multiple
        torchscript.write_unet(network, folder / name)
    files = {"unet": name}
    if source.text_models:
        say("the text encoder")
        path = folder / "text_encoder.ts"
        torchscript.write_text_encoder(source, path, options.torch_dtype)
        files["text_encoder"] = path.name
    if source.vae is not None:
        say("the VAE")
        torchscript.write_vae(source.vae, folder)
        files.update(decoder="decoder.ts", encoder="encoder.ts")
    site = sites_of.unique_name(sites[0], found)
    if site.startswith("#"):
        torchscript.check_ordinal(folder / name, site)
    name = options.name or source.name
    text = description.model_json(name, source.prediction, network, site, files, multiple)
    (folder / "model.json").write_text(text, encoding="utf-8")


def write_model(folder, options):
    say(f"reading {options.source}")
    source = open_source(options)
    # A module's own file may have set them, for this process and not for those that run it.
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    write(source, folder, options)


def export_model(options):
    """Writes the model directory or the folder of packages, whole or not at all. `options`: of
    cli.parse."""
    start = time.time()
    complete(options)
    torch.manual_seed(0)
    # The files are compared with the modules.
    torch.backends.cudnn.allow_tf32 = False
    with new_folder(options.out, options.force) as folder:
        if options.skeleton:
            write_skeleton(FAMILIES[options.skeleton], folder, options)
        else:
            write_model(folder, options)
    say(f"wrote {options.out} in {time.time() - start:.0f} s")
