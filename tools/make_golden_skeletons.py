#!/usr/bin/env python3
"""Writes tests/golden/skeletons/: skeletons of ComfyUI's tiny UNets, so that tests can fill them
from checkpoints. They are traces of diffusers' modules of the same topology."""

import os
import pathlib
import sys

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

try:
    import make_skeletons
    from sag_export import skeleton
    from sag_export.model_folder import new_folder
except ModuleNotFoundError as missing:
    sys.exit(
        f"make_golden_skeletons.py: The package {missing.name} is missing: "
        "pip install './exporter[diffusers]'"
    )

GOLDEN = pathlib.Path(__file__).resolve().parent.parent / "tests" / "golden"

DOWN, UP = "DownBlock2D", "UpBlock2D"
TEXT_DOWN, TEXT_UP = "CrossAttnDownBlock2D", "CrossAttnUpBlock2D"
TINY = {
    "block_out_channels": (16, 16, 32, 48),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "sample_size": 16,
    "down_block_types": (TEXT_DOWN, TEXT_DOWN, TEXT_DOWN, DOWN),
    "up_block_types": (UP, TEXT_UP, TEXT_UP, TEXT_UP),
}
SD2 = {"attention_head_dim": (1, 1, 2, 3), "use_linear_projection": True}
# y is not embedded first, as the real SDXL's sizes are.
SDXL = {
    "block_out_channels": (16, 32, 32),
    "attention_head_dim": (2, 4, 4),
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 1, 2),
    "down_block_types": (DOWN, TEXT_DOWN, TEXT_DOWN),
    "up_block_types": (TEXT_UP, TEXT_UP, UP),
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 48,
}
FAMILIES = {
    family.name: family
    for family in (
        skeleton.Family("comfy_sd15_tiny", TINY | {"attention_head_dim": 4}),
        skeleton.Family("comfy_sd2v_tiny", TINY | SD2, prediction="v"),
        skeleton.Family("comfy_sdxl_tiny", TINY | SDXL),
    )
}


def checkpoint(golden):
    """The tensors of a checkpoint with the weights of a golden UNet, a loaded archive."""
    return {
        f"model.diffusion_model.{name.removeprefix('unet.')}": parameter.detach()
        for name, parameter in golden.named_parameters()
    }


if __name__ == "__main__":
    for name, family in FAMILIES.items():
        with new_folder(GOLDEN / "skeletons" / name, force=True) as folder:
            make_skeletons.write_alone(family, folder, ())
