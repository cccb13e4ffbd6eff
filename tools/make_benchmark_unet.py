#!/usr/bin/env python3
"""Writes a full-size UNet with random weights as TorchScript, to measure with (scripts/bench.sh).

    tools/make_benchmark_unet.py --shape sd15 --out sd15.ts
    tools/make_benchmark_unet.py --shape sdxl --out sdxl.ts --dtype fp16 --device cuda

The classes are diffusers' (tools/requirements.txt), the configurations those of Stable Diffusion 1.5 and SDXL base;
nothing is downloaded. The file's forward is (x, timesteps, context) or, for sdxl, (x, timesteps, context, y) with
y = pooled text (1280) and size embedding's six numbers, in a row.
"""

import argparse
import sys
import time

import torch
from diffusers import UNet2DConditionModel

from export import unet as unets

SD15 = dict(
    sample_size=64,
    cross_attention_dim=768,
    attention_head_dim=8,
    block_out_channels=(320, 640, 1280, 1280),
    down_block_types=("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
)
SDXL = dict(
    sample_size=128,
    cross_attention_dim=2048,
    attention_head_dim=(5, 10, 20),
    block_out_channels=(320, 640, 1280),
    transformer_layers_per_block=(1, 2, 10),
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    use_linear_projection=True,
    addition_embed_type="text_time",
    addition_time_embed_dim=256,
    projection_class_embeddings_input_dim=2816,
)
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["sd15", "sdxl"], required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    start = time.time()
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        unet = UNet2DConditionModel(**(SD15 if args.shape == "sd15" else SDXL))
    unet = unet.to(DTYPES[args.dtype]).eval().requires_grad_(False)
    network = unets.wrap(unet)
    with torch.no_grad():
        # A small picture: a trace holds for every size.
        traced = torch.jit.trace(network.module, tuple(network.example(2, 32, 32).values()), check_trace=False)
        inputs = tuple(network.example(3, 32, 32, seed=1).values())
        expected = network.module(*inputs)
        difference = (traced(*inputs) - expected).abs().max().item()
        largest = expected.abs().max().item()
    if not difference <= 1e-2 * largest:
        sys.exit(f"The trace differs from the model by {difference} of {largest}.")
    traced.save(args.out)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"{args.out}: {millions:.0f} M parameters, {args.dtype}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
