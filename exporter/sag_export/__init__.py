"""Exports diffusion models for sag: to TorchScript, or compiled by AOTInductor."""

__version__ = "0.1.0"

PROGRAM = "sag-export"

# What --dtype takes, and what PyTorch calls it.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}

# The families of checkpoints that --skeleton knows.
FAMILIES = ("sd1", "sd2", "sdxl")
