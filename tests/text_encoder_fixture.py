"""Writes the text encoders and textual inversions that embedding_test.cpp reads.

    python text_encoder_fixture.py <folder>

sd.ts and sdxl.ts know no added token; sd_fox.ts and sdxl_fox.ts were exported with <fox>. The
latter are what the former must become.
"""

import copy
import pathlib
import shutil
import sys

import torch
from safetensors.torch import save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
)

import make_tiny_pipeline
from sag_export.text import make_text_and_size_encoder, make_text_encoder

WIDTH, WIDTH_2, VECTORS = 16, 24, 3


def make_model(kind, tokenizer, seed, layers=3, width=16):
    torch.manual_seed(seed)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=8,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = kind(config).eval().requires_grad_(False)
    # Random weights are small, and the states of all texts near each other.
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    return model


def with_vectors(model, vectors):
    model = copy.deepcopy(model)
    known = model.get_input_embeddings().num_embeddings
    model.resize_token_embeddings(known + len(vectors), mean_resizing=False)
    model.get_input_embeddings().weight.data[known:] = vectors
    return model.requires_grad_(False)


def main(folder):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    make_tiny_pipeline.write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
    first = make_model(CLIPTextModel, tokenizer, seed=1, width=WIDTH)
    second = make_model(CLIPTextModelWithProjection, tokenizer, seed=2, width=WIDTH_2)
    make_text_encoder(tokenizer, first).save(folder / "sd.ts")
    make_text_and_size_encoder(tokenizer, first, tokenizer, second, 8).save(folder / "sdxl.ts")

    torch.manual_seed(1)
    fox, fox_2 = torch.randn(VECTORS, WIDTH), torch.randn(VECTORS, WIDTH_2)
    save_file({"emb_params": fox}, folder / "a1111.safetensors")
    save_file({"<fox>": fox[0].clone()}, folder / "diffusers.safetensors")
    save_file({"clip_l": fox, "clip_g": fox_2}, folder / "sdxl.safetensors")
    save_file({"text_encoders_0": fox, "text_encoders_1": fox_2}, folder / "cog.safetensors")
    save_file({"clip_l": fox}, folder / "clip_l.safetensors")

    known = copy.deepcopy(tokenizer)
    known.add_tokens(["<fox>", *(f"<fox>_{i}" for i in range(1, VECTORS))])
    first, second = with_vectors(first, fox), with_vectors(second, fox_2)
    make_text_encoder(known, first).save(folder / "sd_fox.ts")
    make_text_and_size_encoder(known, first, known, second, 8).save(folder / "sdxl_fox.ts")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
