"""The command line of sag-export. It imports PyTorch only after the options are read."""

import argparse
import difflib
import logging
import os
import pathlib
import re
import sys
import warnings

from sag_export import DTYPES, FAMILIES, PROGRAM, __version__
from sag_export.description import CONSTANTS
from sag_export.mistake import Mistake
from sag_export.needs import needed_packages

DESCRIPTION = """\
Writes a model directory for sag-sample --model: the UNet, and what prompts and pictures need. From
then on no Python is needed.

SOURCE is one of

  the folder of a diffusers pipeline (with model_index.json): Stable Diffusion 1.x, 2.x, XL, or a
    model built like them
  the folder of a diffusers UNet (with config.json): exports the UNet alone; needs --prediction
  MODULE:FACTORY: a function without arguments that returns a torch.nn.Module with forward(x,
    timesteps[, context[, y]]). MODULE.py is in the current folder or on Python's path. Needs
    --prediction and --sample, --context and --y if its forward takes them, and --site if it has
    no middle block

or, in place of SOURCE, --skeleton FAMILY: the UNet of a family of checkpoints, compiled without
weights. DIR becomes a folder of packages, on which sag-sample --checkpoint FILE --compiled DIR runs
every checkpoint of the family.

Nothing is downloaded. Every file is read back and compared with what it was made from, and DIR
appears only when all of them agree.
"""
EPILOG = """examples:
  sag-export ~/models/stable-diffusion-v1-5 --out sd15
  sag-export ~/models/sdxl --out sdxl --device cuda --dtype fp16
  sag-export ~/models/sdxl --out sdxl --device cuda --format aoti --rows 1,2,3 --size 128x128
  sag-export ~/models/sd21/unet --out sd21 --prediction v --constant zero_terminal_snr=true
  sag-export --skeleton sdxl --out any-sdxl --device cuda --format aoti --rows 1,2,3 --size 128x128
  sag-export my_models:make_unet --out mine --prediction flow --sample 4x32x32 --context 77x768

docs/models.md in sag's repository is the guide.
"""


def numbers(count, what):
    """An argparse type: so many whole numbers with x between them."""

    def parse(text):
        if not re.fullmatch(r"x".join([r"[1-9]\d{0,5}"] * count), text):
            raise argparse.ArgumentTypeError(f'must be {what}, got "{text}"')
        return tuple(map(int, text.split("x")))

    return parse


def dim(text):
    """What write_package takes: "64", "32-128" or "32-128/8"."""
    found = re.fullmatch(r"([1-9]\d{0,5})(?:-([1-9]\d{0,5})(?:/([1-9]\d{0,5}))?)?", text)
    parts = found.groups() if found else (None, None, None)
    low, high, multiple = (int(part) if part else None for part in parts)
    if (
        not found
        or (high is not None and high <= low)
        or (multiple and (low % multiple or high % multiple))
    ):
        raise argparse.ArgumentTypeError(
            "must be a number, LOW-HIGH, or LOW-HIGH/MULTIPLE with both of them multiples, "
            f'got "{text}"'
        )
    return low if high is None else (low, high, multiple) if multiple else (low, high)


def rows(text):
    return [dim(part) for part in text.split(",")]


def size(text):
    sides = text.split("x")
    if len(sides) != 2:
        raise argparse.ArgumentTypeError(f'must be HEIGHTxWIDTH, got "{text}"')
    return dim(sides[0]), dim(sides[1])


def concat(text):
    if text in ("inpaint", "edit"):
        return text
    if not re.fullmatch(r"[1-9]\d{0,4}", text):
        raise argparse.ArgumentTypeError(f'must be inpaint, edit or a whole number, got "{text}"')
    return int(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        hint = "; --help lists the options."
        if message.startswith("unrecognized arguments: "):
            given = message.split()[2].partition("=")[0]
            near = difflib.get_close_matches(given, self._option_string_actions, n=1)
            hint = f"; do you mean {near[0]}?" if near else hint
        self.exit(1, f"{PROGRAM}: {message}{hint}\n")


def parse(arguments):
    parser = Parser(
        prog=PROGRAM,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("source", metavar="SOURCE", nargs="?", help="what to export; see above")
    add(
        "--skeleton",
        choices=FAMILIES,
        help="a family of checkpoints, in place of SOURCE; needs --format aoti",
    )
    add(
        "--out",
        metavar="DIR",
        type=pathlib.Path,
        help="the model directory to write; with --skeleton, the folder of packages",
    )
    add("--force", action="store_true", help="replace DIR if sag-export wrote it")
    add("--name", help="the model's name [SOURCE's]")
    add(
        "--format",
        choices=["torchscript", "aoti"],
        default="torchscript",
        help="of the UNet. torchscript takes any rows and sizes; aoti is compiled for this kind of "
        "device, and is faster [torchscript]",
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
        help="where the UNet is traced, or what it is compiled for [cpu]",
    )
    add(
        "--site",
        action="append",
        default=[],
        metavar="SITE",
        help="the self-attention to watch: a name (middle.0.0), a dotted path, #ordinal, or all. "
        "May be given several times: the first one goes into model.json. With --format aoti only "
        "these can be hooked later [the first one of the middle block]",
    )
    add("--unet-only", action="store_true", help="leave out the text encoder and the VAE")
    add(
        "--variant",
        metavar="NAME",
        help="the variant of the weights to read (fp16, ema, ...), in the parts that have it [the "
        "plain weights, or the only variant]",
    )
    add(
        "--prediction",
        choices=list(CONSTANTS),
        help="what the UNet predicts [what the pipeline's scheduler says; its constants are kept]",
    )
    add(
        "--constant",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a constant of the prediction, as in model.json: beta_start=0.0008, shift=3, "
        "zero_terminal_snr=true ...; may be given several times",
    )
    add(
        "--sample",
        type=numbers(3, "CHANNELSxHEIGHTxWIDTH"),
        metavar="CxHxW",
        help="the default latent [the UNet's sample_size]",
    )
    add(
        "--concat",
        type=concat,
        metavar="KIND",
        help="what x holds after the latent's channels: inpaint (a mask, and the latent of the "
        "picture without what is repainted), edit (the latent of a picture, as in "
        "instruct-pix2pix), or how many channels of a tensor of your own [what the pipeline's "
        "class and the UNet's channels say]",
    )
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    group = parser.add_argument_group("a module of your own (MODULE:FACTORY)")
    group.add_argument(
        "--context",
        type=numbers(2, "TOKENSxWIDTH"),
        metavar="TxW",
        help="tokens and width of the context [no context]",
    )
    group.add_argument(
        "--y",
        type=numbers(1, "a whole number"),
        metavar="N",
        help="how many numbers y holds [no y]",
    )
    group.add_argument(
        "--multiple",
        type=numbers(1, "a whole number"),
        metavar="N",
        default=(1,),
        help="the latent's height and width must be multiples of this [1]",
    )
    group = parser.add_argument_group("compiled packages (--format aoti)")
    group.add_argument(
        "--rows",
        type=rows,
        metavar="ROWS",
        help="rows of a UNet call: 1-8 makes one package for all of them; 1,2,3 makes one package "
        "for each, which are faster and share one file of weights [1-8]",
    )
    group.add_argument(
        "--size",
        type=size,
        action="append",
        metavar="HxW",
        help="latent size: 64x64, or ranges: 32-128x32-128, or 32-128/16x32-128/16 for multiples "
        "of 16. May be given several times: every size gets a package for each number of rows "
        "[half to twice the default latent]",
    )
    group.add_argument(
        "--channels-last",
        choices=["auto", "on", "off"],
        default="auto",
        help="layout of the convolutions. auto: on if it is compiled for CUDA in half precision "
        "and convolutions hold 5 %% of the parameters [auto]",
    )
    group.add_argument(
        "--cross-attention",
        action="store_true",
        help="all cross-attentions can be hooked later, too, and the context may "
        "hold two prompts, as NAG needs",
    )
    options = parser.parse_args(arguments)
    needed = {"SOURCE or --skeleton": options.source or options.skeleton, "--out": options.out}
    if missing := [name for name, given in needed.items() if not given]:
        parser.error(f"the following arguments are required: {', '.join(missing)}")
    options.y, options.multiple = options.y and options.y[0], options.multiple[0]
    return options


def main():
    options = parse(sys.argv[1:])
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore")
    # What the libraries would say is checked here, and said in a sentence.
    logging.disable(logging.CRITICAL)
    try:
        with needed_packages(PROGRAM):
            # Takes seconds: it imports PyTorch.
            from sag_export.export import export_model

            export_model(options)
    # OSError: a full disk, for example.
    except (Mistake, OSError) as error:
        sys.exit(f"{PROGRAM}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"{PROGRAM}: Interrupted; nothing was written.")
