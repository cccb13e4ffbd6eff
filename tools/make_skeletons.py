#!/usr/bin/env python3
"""Writes models/skeletons/: the networks of Stable Diffusion 1, 2 and XL without their weights,
which sag fills from checkpoints. To make them again, with the versions of tools/requirements.txt:

    pip download --no-deps open_clip_torch==3.3.0
    tools/make_skeletons.py open_clip_torch-3.3.0-py3-none-any.whl

The wheel is only read for CLIP's vocabulary, open_clip/bpe_simple_vocab_16e6.txt.gz (MIT, see
models/skeletons/NOTICE). The same versions give the same files.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import pathlib
import sys
import tempfile
import warnings
import zipfile

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

try:
    from transformers import CLIPTokenizerFast

    from sag_export import skeleton
    from sag_export.model_folder import new_folder
    from sag_export.tokenizer import byte_characters
except ModuleNotFoundError as missing:
    sys.exit(
        f"make_skeletons.py: The package {missing.name} is missing: "
        "pip install './exporter[diffusers]'"
    )

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "models" / "skeletons"
ENTRY = "open_clip/bpe_simple_vocab_16e6.txt.gz"
BEGIN, END = "<|startoftext|>", "<|endoftext|>"
# The file has more of them than CLIP was trained with.
MERGES = skeleton.VOCABULARY - 2 * 256 - 2


def read_merges(wheel):
    with zipfile.ZipFile(wheel) as archive:
        lines = gzip.decompress(archive.read(ENTRY)).decode("utf-8").split("\n")
    # The first line is a version.
    return lines[1 : 1 + MERGES]


def vocabulary(merges):
    """The tokens in the order of their ids. Bytes that are printable come first."""
    characters = byte_characters()
    ordered = [c for byte, c in enumerate(characters) if ord(c) == byte]
    ordered += [c for byte, c in enumerate(characters) if ord(c) != byte]
    words = [*ordered, *(c + "</w>" for c in ordered)]
    tokens = [*words, *("".join(merge.split()) for merge in merges), BEGIN, END]
    assert len(set(tokens)) == skeleton.VOCABULARY
    return tokens


def make_tokenizer(merges, padding):
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        ids = {token: i for i, token in enumerate(vocabulary(merges))}
        (folder / "vocab.json").write_text(json.dumps(ids), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
        tokenizer = CLIPTokenizerFast(
            str(folder / "vocab.json"),
            str(folder / "merges.txt"),
            pad_token=END,
            model_max_length=skeleton.TOKENS,
        )
    # Set later, so that it does not become an added token: OpenCLIP's text encoders were padded
    # with 0, which is "!", but know "!!" in a prompt as one token.
    tokenizer.pad_token = padding
    return tokenizer


def tokenizers(family, merges):
    """OpenAI's CLIP was padded with the end of the text, OpenCLIP with zeros."""
    return [make_tokenizer(merges, "!" if text.open_clip else END) for text in family.text]


def write(name, merges, out):
    family = skeleton.FAMILIES[name]
    with new_folder(out / name, force=True) as folder:
        write_alone(family, folder, tokenizers(family, merges))


def write_alone(*arguments):
    """skeleton.write in a process of its own: PyTorch numbers the classes of a process, and the
    numbers stand in the archives, as does the order of a set of texts."""
    os.environ["PYTHONHASHSEED"] = "0"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        pool.apply(write_quietly, arguments)


def write_quietly(*arguments):
    warnings.filterwarnings("ignore")
    skeleton.write(*arguments)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel")
    parser.add_argument("families", nargs="*", help="[all]", metavar="FAMILY")
    parser.add_argument("--out", type=pathlib.Path, default=FOLDER)
    options = parser.parse_args()
    unknown = set(options.families) - set(skeleton.FAMILIES)
    if unknown:
        parser.error(f"FAMILY must be one of {', '.join(skeleton.FAMILIES)}")
    options.out.mkdir(parents=True, exist_ok=True)
    merges = read_merges(options.wheel)
    for name in options.families or skeleton.FAMILIES:
        write(name, merges, options.out)
        size = sum(file.stat().st_size for file in (options.out / name).iterdir())
        print(f"{name}: {size / 2**20:.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
