#!/usr/bin/env python3
"""Writes a small diffusers pipeline of random weights, in the form of the real ones, to try
sag-export with.

    tools/make_tiny_pipeline.py sdxl /tmp/tiny-sdxl
    sag-export /tmp/tiny-sdxl --out /tmp/tiny

Kinds: sd1 (eps), sd2 (v, zero terminal SNR), sdxl (two text encoders, sizes), flow (sd1 with a flow
scheduler), inpaint (9 channels), edit (instruct-pix2pix, 8 channels), lcm (an embedded scale of
guidance).
"""

import argparse
import json
import pathlib
import sys

try:
    import torch
    from diffusers import (
        AutoencoderKL,
        DDIMScheduler,
        EulerDiscreteScheduler,
        FlowMatchEulerDiscreteScheduler,
        LCMScheduler,
        UNet2DConditionModel,
    )
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTextModelWithProjection,
        CLIPTokenizerFast,
    )

    from sag_export.tokenizer import byte_characters
except ModuleNotFoundError as missing:
    sys.exit(
        f"make_tiny_pipeline.py: The package {missing.name} is missing: "
        "pip install './exporter[diffusers]'"
    )

KINDS = ("sd1", "sd2", "sdxl", "flow", "inpaint", "edit", "lcm")
WIDTH = 32
MERGES = (
    "i n, t h, a n, r e, e r</w>, o n</w>, th e</w>, c a, ca t</w>, an d</w>, re d</w>, ' s</w>, "
    ". ., .. .</w>"
)
TABLE = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
}
PIPELINES = {
    "sdxl": "StableDiffusionXLPipeline",
    "inpaint": "StableDiffusionInpaintPipeline",
    "edit": "StableDiffusionInstructPix2PixPipeline",
    "lcm": "LatentConsistencyModelPipeline",
}
# What differs in the configurations of UNets like sd1's.
UNETS = {
    "sd2": {"use_linear_projection": True},
    "inpaint": {"in_channels": 9},
    "edit": {"in_channels": 8},
    "lcm": {"time_cond_proj_dim": 24},
}


def vocabulary():
    """Byte pairs in CLIP's form: all bytes, all bytes at the end of a word, the results of
    the merges, begin and end."""
    merges = [tuple(merge.split()) for merge in MERGES.split(",")]
    known = [*byte_characters(), *(c + "</w>" for c in byte_characters())]
    kept = []
    for left, right in merges:
        if left in known and right in known:
            kept.append((left, right))
            known.append(left + right)
    return {token: i for i, token in enumerate([*known, "<|startoftext|>", "<|endoftext|>"])}, kept


def write_tokenizer(folder, padding="<|endoftext|>"):
    folder.mkdir(parents=True)
    tokens, merges = vocabulary()
    (folder / "vocab.json").write_text(json.dumps(tokens, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizerFast(
        str(folder / "vocab.json"),
        str(folder / "merges.txt"),
        pad_token=padding,
        model_max_length=77,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def write_text_encoder(folder, kind, tokenizer):
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    kind(config).save_pretrained(folder)


def make_unet(kind):
    heads_and_blocks = {
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": (2, 4),
        "sample_size": 16,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }
    if kind != "sdxl":
        return UNet2DConditionModel(
            **heads_and_blocks, cross_attention_dim=WIDTH, **UNETS.get(kind, {})
        )
    return UNet2DConditionModel(
        **heads_and_blocks,
        cross_attention_dim=2 * WIDTH,
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )


def make_scheduler(kind):
    if kind == "flow":
        return FlowMatchEulerDiscreteScheduler(shift=3.0)
    if kind == "lcm":
        return LCMScheduler(**TABLE)
    if kind == "sd2":
        return DDIMScheduler(**TABLE, prediction_type="v_prediction", rescale_betas_zero_snr=True)
    return EulerDiscreteScheduler(**TABLE)


def make(kind, folder):
    """Writes the pipeline of this kind. The same kind gives the same weights."""
    torch.manual_seed(0)
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True)
    make_unet(kind).save_pretrained(folder / "unet")
    AutoencoderKL(
        block_out_channels=(8, 16, 16, 16),
        norm_num_groups=4,
        layers_per_block=1,
        latent_channels=4,
        sample_size=128,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.13025 if kind == "sdxl" else 0.18215,
    ).save_pretrained(folder / "vae")
    make_scheduler(kind).save_pretrained(folder / "scheduler")
    write_text_encoder(
        folder / "text_encoder", CLIPTextModel, write_tokenizer(folder / "tokenizer")
    )
    index = {
        "_class_name": PIPELINES.get(kind, "StableDiffusionPipeline"),
        "scheduler": ["diffusers", type(make_scheduler(kind)).__name__],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    if kind == "sdxl":
        write_text_encoder(
            folder / "text_encoder_2",
            CLIPTextModelWithProjection,
            write_tokenizer(folder / "tokenizer_2", padding="!"),
        )
        index.update(
            text_encoder_2=["transformers", "CLIPTextModelWithProjection"],
            tokenizer_2=["transformers", "CLIPTokenizer"],
        )
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder")
    options = parser.parse_args()
    if pathlib.Path(options.folder).exists():
        raise SystemExit(f'make_tiny_pipeline.py: "{options.folder}" exists.')
    make(options.kind, options.folder)
