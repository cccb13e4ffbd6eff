#!/usr/bin/env python3
"""Writes a checkpoint of random weights with all the tensors of a family, in the names and shapes
of the real files, to try and to measure with:

    tools/make_random_checkpoint.py sdxl /tmp/sdxl.safetensors
    sag-sample --checkpoint /tmp/sdxl.safetensors --prompt "a red fox" --out noise.png

It needs PyTorch and NumPy, and writes tensor by tensor: the whole file never lies in memory.
"""

import argparse
import json
import math
import pathlib
import struct
import zipfile

import torch

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "models" / "skeletons"
DTYPES = {
    "fp32": ("F32", torch.float32),
    "fp16": ("F16", torch.float16),
    "bf16": ("BF16", torch.bfloat16),
}
# What tells that a file predicts v: in Stable Diffusion 2 the spread of this tensor.
SD2_MARKER = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
MARKER = "v_pred"


def stored_shape(entries):
    """Of the tensor that holds these parameters."""
    shape = list(entries[0]["shape"])
    if "rows" in entries[0]:
        shape[0] = max(entry["rows"][1] for entry in entries)
    return shape[::-1] if entries[0].get("transposed") else shape


def read_shapes(folder):
    """The shape of every tensor, by its name in the file."""
    users = {}
    for path in sorted(folder.glob("*.ts")):
        with zipfile.ZipFile(path) as archive:
            names = json.loads(archive.read(f"{path.stem}/extra/names.json"))
        for entry in names["parameters"].values():
            users.setdefault(entry["key"], []).append(entry)
    return {key: stored_shape(entries) for key, entries in sorted(users.items())}


def drawn(key, shape, prediction):
    """Weights keep the size of what they are given; norms start as they do in training."""
    if key == SD2_MARKER and prediction == "v":
        return torch.randn(shape)
    if len(shape) == 1:
        return torch.ones(shape) if key.endswith("weight") else torch.zeros(shape)
    if "embedding" in key:
        return 0.02 * torch.randn(shape)
    return torch.randn(shape) / math.sqrt(math.prod(shape[1:]))


def header_of(shapes, dtype):
    name, torch_dtype = DTYPES[dtype]
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + math.prod(shape) * torch_dtype.itemsize
        header[key] = {"dtype": name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    return text + b" " * (-len(text) % 8)


def write(family, path, dtype, prediction, channels):
    shapes = read_shapes(FOLDER / family)
    shapes["model.diffusion_model.input_blocks.0.0.weight"][1] = channels
    if prediction == "v" and SD2_MARKER not in shapes:
        shapes[MARKER] = [0]
    header = header_of(shapes, dtype)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for key, shape in shapes.items():
            tensor = drawn(key, shape, prediction).to(DTYPES[dtype][1])
            file.write(tensor.view(torch.uint8).numpy().tobytes())


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    families = sorted(folder.name for folder in FOLDER.iterdir() if folder.is_dir())
    parser.add_argument("family", choices=families)
    parser.add_argument("path", type=pathlib.Path)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--prediction", choices=["eps", "v"], default="eps")
    parser.add_argument("--channels", type=int, choices=[4, 8, 9], default=4)
    options = parser.parse_args()
    torch.manual_seed(0)
    write(options.family, options.path, options.dtype, options.prediction, options.channels)


if __name__ == "__main__":
    main()
