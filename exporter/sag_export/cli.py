#!/usr/bin/env python3
"""Writes a model directory for sag-sample --model: the UNet, and what prompts and pictures need without Python.

SOURCE is one of

  a diffusers pipeline's folder (with model_index.json): Stable Diffusion 1.x, 2.x or XL, or one like them
  a diffusers UNet's folder (with config.json): the UNet alone, for sag-sample's --cond and --uncond; needs --prediction
  MODULE:FACTORY: a function without arguments that returns a torch.nn.Module with forward(x, timesteps[, context[,
  y]]), in MODULE.py of the current folder or anywhere on Python's path; needs --prediction and --sample, --context and
  --y for what its forward takes, and --site where it has no middle block

Nothing is downloaded. Every file is read back and compared with what it was made of, and DIR appears when all is well.
docs/models.md says more.
"""

import argparse
import logging
import os
import pathlib
import re
import sys
import time
import warnings

EXAMPLES = """examples:
  tools/export_model.py ~/models/stable-diffusion-v1-5 --out sd15
  tools/export_model.py ~/models/sdxl --out sdxl --device cuda --dtype fp16
  tools/export_model.py ~/models/sdxl --out sdxl --device cuda --format aoti --rows 1,2,3 --size 128x128
  tools/export_model.py ~/models/sd21/unet --out sd21 --prediction v --constant zero_terminal_snr=true
  tools/export_model.py my_models:make_unet --out mine --prediction flow --sample 4x32x32 --context 77x768
"""
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


def numbers(count, what):
    """An argparse type: so many whole numbers with x between."""

    def parse(text):
        if not re.fullmatch(r"x".join([r"[1-9]\d{0,5}"] * count), text):
            raise argparse.ArgumentTypeError(f'must be {what}, got "{text}"')
        return tuple(map(int, text.split("x")))

    return parse


def dim(text):
    """What write_package takes: "64", or "32-128", or "32-128/8"."""
    found = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5})(?:/([1-9]\d{0,5}))?)?", text)
    low, high, multiple = (int(part) if part else None for part in found.groups()) if found else (None, None, None)
    if not found or (high is not None and high <= low) or (multiple and (low % multiple or high % multiple)):
        raise argparse.ArgumentTypeError(
            f'must be a number, LOW-HIGH, or LOW-HIGH/MULTIPLE of whose multiples both are, got "{text}"'
        )
    return low if high is None else (low, high, multiple) if multiple else (low, high)


def rows(text):
    return [dim(part) for part in text.split(",")]


def size(text):
    sides = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH, got "{text}"')
    return dim(sides[0]), dim(sides[1])


class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(1, f"export_model.py: {message}; --help lists the options.\n")


def parse(arguments):
    parser = Parser(
        prog="export_model.py",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", help="what to export; see above")
    add("--out", metavar="DIR", required=True, type=pathlib.Path, help="the model directory to write")
    add("--force", action="store_true", help="replace DIR if it is a model directory")
    add("--name", help="the model's name [SOURCE's]")
    add(
        "--format",
        choices=["torchscript", "aoti"],
        default="torchscript",
        help="of the UNet: TorchScript, which takes any rows and sizes, or compiled by AOTInductor for this kind of "
        "device [torchscript]",
    )
    add(
        "--dtype",
        choices=list(DTYPES),
        help="of the UNet and of the text encoder's file [fp32 on the CPU, fp16 on CUDA]",
    )
    add(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="where the UNet is traced, or for which it is compiled [cpu]",
    )
    add(
        "--site",
        action="append",
        default=[],
        metavar="SITE",
        help="self-attention to watch, by name (middle.0.0), dotted path, #ordinal, or all (then the middle block's "
        "is watched); may be given several times. aoti: only these can be hooked; the first is model.json's [the middle "
        "block's first]",
    )
    add("--unet-only", action="store_true", help="leave text encoder and VAE out")
    add(
        "--prediction",
        choices=["eps", "v", "x0", "edm", "flow"],
        help="what the UNet predicts [what the pipeline's scheduler says; its constants are kept]",
    )
    add(
        "--constant",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a constant of the prediction, as in model.json: beta_start, shift, sigma_max, zero_terminal_snr=true ...",
    )
    add(
        "--sample",
        type=numbers(3, "CHANNELSxHEIGHTxWIDTH"),
        metavar="CxHxW",
        help="the latent by default [the UNet's sample_size]",
    )
    group = parser.add_argument_group("a module of your own")
    group.add_argument(
        "--context",
        type=numbers(2, "TOKENSxWIDTH"),
        metavar="TxW",
        help="tokens and width of the context [it takes none]",
    )
    group.add_argument("--y", type=numbers(1, "a whole number"), metavar="N", help="numbers in y [it takes none]")
    group.add_argument(
        "--multiple",
        type=numbers(1, "a whole number"),
        metavar="N",
        default=(1,),
        help="that a latent's height and width must be multiples of [1]",
    )
    group = parser.add_argument_group("compiled packages (--format aoti); several share their weights")
    group.add_argument(
        "--rows",
        type=rows,
        metavar="ROWS",
        help="rows of a call: 1-8 (one package, which takes all of them) or 1,2,3 (one each, faster) [1-8]",
    )
    group.add_argument(
        "--size",
        type=size,
        action="append",
        metavar="HxW",
        help="latent size: 64x64, or a range, 32-128x32-128 or 32-128/16x32-128/16 (multiples of 16 only); may be given "
        "several times; a package for each number of rows and size [half to twice the latent]",
    )
    group.add_argument(
        "--channels-last",
        choices=["auto", "on", "off"],
        default="auto",
        help="layout of the convolutions; auto: on CUDA in half precision if they hold 5 %% of the parameters [auto]",
    )
    options = parser.parse_args(arguments)
    options.y, options.multiple = options.y and options.y[0], options.multiple[0]
    return options


def say(text):
    print(f"export_model.py: {text}", file=sys.stderr, flush=True)


def complete(options):
    """Checks what argparse cannot, and fills in what follows from other options."""
    if options.device == "cuda" and not torch.cuda.is_available():
        raise Mistake("--device cuda: there is no CUDA device.")
    options.dtype = options.dtype or ("fp16" if options.device == "cuda" else "fp32")
    options.torch_dtype = getattr(torch, DTYPES[options.dtype])
    options.note = say
    if options.format == "torchscript" and (options.rows or options.size or options.channels_last != "auto"):
        raise Mistake("--rows, --size and --channels-last are for --format aoti; TorchScript takes any rows and sizes.")
    if ":" not in options.source and (options.context or options.y or options.multiple != 1):
        raise Mistake("--context, --y and --multiple are for MODULE:FACTORY; a UNet's config.json says them.")
    if options.y and not options.context:
        raise Mistake("--y needs --context: a forward takes x, timesteps, context and y, in this order.")


def default_sizes(network):
    """From half to twice the default latent, in steps that the network takes without a detour."""
    step = network.fastest_multiple
    return [
        tuple((max(side // 2 // step, 1) * step, max(side * 2 // step, 2) * step, step) for side in network.shape[1:])
    ]


def with_multiple(dim, multiple):
    return (*dim, multiple) if isinstance(dim, tuple) and len(dim) == 2 else dim


def write_compiled(network, folder, options, sites):
    """Compiles the UNet. Returns its name and what height and width must be multiples of."""
    step = network.fastest_multiple
    sizes = options.size and [tuple(with_multiple(side, step) for side in pair) for pair in options.size]
    for low, high, *_ in (side for pair in sizes or [] for side in pair if isinstance(side, tuple)):
        if low % step or high % step:
            raise Mistake(
                f"A range of --size must begin and end with multiples of {step} for this network, got {low}-{high}."
            )
    for side in (side for pair in sizes or [] for side in pair if not isinstance(side, tuple)):
        if side % network.multiple:
            raise Mistake(f"A --size must be a multiple of {network.multiple} for this network, got {side}.")
    sizes = sizes or default_sizes(network)
    rows = options.rows or [(1, 8)]
    if all(bounds(dim)[0] > 1 for dim in rows):
        say("note: no package takes one row, which SAG asks for beside the two of CFG; --rows 1,2 would do for both")
    on = options.channels_last == "on"
    if options.channels_last == "auto":
        on = options.device == "cuda" and options.dtype != "fp32" and network.convolution_share() >= 0.05
    if on:
        network.module.to(memory_format=torch.channels_last)
    name = compiled.write_unet(network, folder, rows, sizes, sites, say)
    network.shape = (network.shape[0], *fitting(network.shape[1:], sizes))
    return name, step if all(side % step == 0 for pair in sizes for dim in pair for side in compiled.tried(dim)) else 1


def fitting(latent, sizes):
    """The default latent if a package takes it, else the first package's that is nearest."""

    def nearest(side, dim):
        low, high, multiple = bounds(dim)
        return min(max(side // multiple * multiple, low), high)

    fits = [tuple(map(nearest, latent, pair)) for pair in sizes]
    return latent if latent in fits else fits[0]


def write(source, folder, options):
    network = source.network
    network.check()
    found = network.sites()
    sites = sites_of.choose(options.site, found)
    millions = sum(p.numel() for p in network.module.parameters()) / 1e6
    say(f"the UNet: {millions:.1f} M parameters, {options.dtype}, {options.format}")
    if options.format == "aoti":
        name, multiple = write_compiled(network, folder, options, sites)
    else:
        name, multiple = "unet.ts", network.multiple
        torchscript.write_unet(network, folder / name)
    files = {"unet": name}
    if source.text_models:
        say("the text encoder")
        torchscript.write_text_encoder(source, folder / "text_encoder.ts", options.torch_dtype)
        files["text_encoder"] = "text_encoder.ts"
    if source.vae is not None:
        say("the VAE")
        torchscript.write_vae(source.vae, folder)
        files.update(decoder="decoder.ts", encoder="encoder.ts")
    site = sites_of.unique_name(sites[0], found)
    text = description.model_json(options.name or source.name, source.prediction, network, site, files, multiple)
    (folder / "model.json").write_text(text, encoding="utf-8")


def run(options):
    start = time.time()
    complete(options)
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False  # the files are compared with the modules
    with new_folder(options.out, options.force) as folder:
        say(f"reading {options.source}")
        source = open_source(options)
        write(source, folder, options)
    say(f"wrote {options.out} in {time.time() - start:.0f} s")


if __name__ == "__main__":
    options = parse(sys.argv[1:])  # before seconds of loading PyTorch
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from sag_export.needs import needed_packages  # noqa: E402

with needed_packages("export_model.py"):
    import torch

    from sag_export import compiled, description, torchscript
    from sag_export import sites as sites_of
    from sag_export.mistake import Mistake
    from sag_export.model_folder import new_folder
    from sag_export.package import bounds
    from sag_export.source import open_source

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    try:
        with needed_packages("export_model.py"):
            run(options)
    except Mistake as mistake:
        sys.exit(f"export_model.py: {mistake}")
    except OSError as error:  # a full disk, say
        sys.exit(f"export_model.py: {error}")
    except KeyboardInterrupt:
        sys.exit("export_model.py: Interrupted; nothing was written.")
