"""Writes the files that ship: unet.ts, text_encoder.ts, model.json, names.txt."""

import argparse
import json
import pathlib

import numpy as np
import torch

import diffusion
from sag_export.archive import check_clean, save
from train import Model

TRACED_WITH = ("red heart", "cat face")
CHECKED_WITH = ("rocket", "", "an unseen wörd 7")


def check_unet(path, unet):
    """Compares the file with the module: with another batch and size, cast to fp32, and with
    timesteps in fp32 while the other inputs are fp16."""
    loaded = torch.jit.load(str(path), map_location="cpu")
    x, timesteps, context = (
        torch.randn(3, 3, 48, 80),
        torch.tensor([0.5, 0.1, -0.6]),
        torch.randn(3, 8, 128),
    )
    expected = unet(x, timesteps, context)
    half = loaded(x.half(), timesteps, context.half())
    single = loaded.float()(x, timesteps, context)
    assert half.dtype == torch.float16 and single.dtype == torch.float32
    scale = expected.abs().max().item()
    errors = [(got.float() - expected).abs().max().item() / scale for got in (half, single)]
    print(
        f"unet.ts against the fp32 module: {errors[0]:.1e} in fp16, {errors[1]:.1e} in fp32, "
        "of the largest output",
        flush=True,
    )
    assert max(errors) < 0.05


def check_text(path, encoder):
    loaded = torch.jit.load(str(path), map_location="cpu")
    for prompt in (
        CHECKED_WITH * 4
    ):  # TorchScript optimises after a few runs; an earlier encoder then mixed up its lists
        got, expected = loaded.encode(prompt), encoder.encode(prompt)
        assert got.shape == (1, 8, 128) and got.dtype == torch.float16
        assert torch.allclose(got.float(), expected, atol=0.03), prompt


@torch.no_grad()
def export(model, folder):
    unet, encoder = model.unet, model.encoder
    example = (
        torch.randn(2, 3, 64, 64),
        torch.tensor([0.1, -0.3]),
        torch.cat([encoder.encode(prompt) for prompt in TRACED_WITH]),
    )
    save(torch.jit.trace(unet, example, check_trace=False).half(), folder / "unet.ts")
    unet.float()  # the trace shares its parameters
    check_unet(folder / "unet.ts", unet)
    save(torch.jit.script(encoder).half(), folder / "text_encoder.ts")
    encoder.float()
    check_text(folder / "text_encoder.ts", encoder)
    for name in ("unet.ts", "text_encoder.ts"):
        check_clean(folder / name, __file__)


def description():
    return {
        "format": 1,
        "name": "emoji",
        "prediction": "edm",
        "sigma_data": diffusion.SIGMA_DATA,
        "sigma_min": diffusion.SIGMA_MIN,
        "sigma_max": diffusion.SIGMA_MAX,
        "sample": {"shape": [3, 64, 64], "multiple": 8},
        "site": "middle.0.0",
        "files": {"unet": "unet.ts", "text_encoder": "text_encoder.ts"},
        "defaults": {
            "sampler": "euler",
            "schedule": "karras",
            "steps": 20,
            "cfg": 2.0,
            "sag": {"scale": 1.0, "blur_sigma": 2.0},
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glyphs", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model = Model().eval()
    model.load_state_dict(torch.load(options.weights, map_location="cpu")["state"])
    export(model, options.out)
    (options.out / "model.json").write_text(json.dumps(description(), indent=2) + "\n")
    captions = str(np.load(options.glyphs)["captions"]).replace("|", "\n").split("\n")
    (options.out / "names.txt").write_text("\n".join(sorted(captions)) + "\n")


if __name__ == "__main__":
    main()
