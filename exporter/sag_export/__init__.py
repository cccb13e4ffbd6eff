"""Exports diffusion models for sag: to TorchScript, or compiled by AOTInductor."""

__version__ = "0.1.0"
