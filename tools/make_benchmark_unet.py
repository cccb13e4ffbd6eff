#!/usr/bin/env python3
"""Writes a full-size diffusers UNet with random weights, to measure with (scripts/bench.sh).

    tools/make_benchmark_unet.py --shape sd15 --out build/bench/sd15
    sag-export build/bench/sd15 --out build/bench/sd15.compiled --prediction eps --device cuda \\
        --format aoti --rows 1,2,3 --size 64x64

The configurations are those of Stable Diffusion 1.5 and SDXL base. Nothing is downloaded. The
folder also holds reference.pt for `step_benchmark --reference`: inputs of three rows, the output
that diffusers gives, and the token sums of the middle block's self-attention, computed in fp32 from
the queries and keys that its projections return.
"""

import argparse
import os
import pathlib
import sys
import time

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

try:
    import torch
    from diffusers import UNet2DConditionModel

    from sag_export import unet as unets
except ModuleNotFoundError as missing:
    sys.exit(
        f"make_benchmark_unet.py: The package {missing.name} is missing: "
        "pip install './exporter[diffusers]'"
    )

SD15 = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}
SDXL = {
    "sample_size": 128,
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "transformer_layers_per_block": (1, 2, 10),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def token_sums(query, key, heads, scale):
    """[rows, tokens, heads · width] twice → [rows, tokens]: what each token receives, the mean over
    heads."""
    query, key = (t.float().unflatten(-1, (heads, -1)).transpose(1, 2) for t in (query, key))
    return (query @ key.transpose(-1, -2) * scale).softmax(-1).sum(-2).mean(1)


@torch.no_grad()
def reference(network):
    """The inputs, and what the network gives for them."""
    attention = network.module.unet.mid_block.attentions[0].transformer_blocks[0].attn1
    seen = {}
    hooks = [
        projection.register_forward_hook(
            lambda _, inputs, output, name=name: seen.update({name: output})
        )
        for name, projection in (("query", attention.to_q), ("key", attention.to_k))
    ]
    inputs = network.example(3, *network.shape[1:])
    output = network.module(*inputs.values())
    for hook in hooks:
        hook.remove()
    sums = token_sums(seen["query"], seen["key"], attention.heads, attention.scale)
    return {
        name: tensor.cpu()
        for name, tensor in {**inputs, "output": output.float(), "token_sums": sums}.items()
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=["sd15", "sdxl"], required=True)
    parser.add_argument("--out", required=True, type=pathlib.Path, metavar="DIR")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.out.exists():
        sys.exit(f"{args.out} exists already.")

    start = time.time()
    torch.manual_seed(args.seed)
    with torch.device(args.device):
        unet = UNet2DConditionModel(**(SD15 if args.shape == "sd15" else SDXL))
    unet = unet.to(DTYPES[args.dtype]).eval().requires_grad_(False)
    tensors = reference(unets.wrap(unet))
    partial = args.out.with_name(args.out.name + ".partial")
    unet.save_pretrained(partial)
    torch.save(tensors, partial / "reference.pt")
    partial.rename(args.out)
    millions = sum(p.numel() for p in unet.parameters()) / 1e6
    print(f"{args.out}: {millions:.0f} M parameters, {args.dtype}, {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
