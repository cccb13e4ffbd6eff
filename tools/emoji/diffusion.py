"""EDM (Karras et al. 2022): x = x0 + sigma * noise, the preconditioning outside the network."""

import math

import torch

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX = 0.5, 0.02, 60.0


def preconditioning(sigma):
    """c_skip, c_out, c_in, c_noise of a tensor of sigmas."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA * total.rsqrt(), total.rsqrt(), sigma.log() / 4


def training_sigmas(count, device):
    """Log-normal where the picture is decided, one in ten log-uniform over everything."""
    sigma = torch.exp(torch.randn(count, device=device) * 1.3 - 0.8)
    anywhere = torch.exp(torch.rand(count, device=device) * math.log(80 / 0.02) + math.log(0.02))
    return torch.where(torch.rand(count, device=device) < 0.1, anywhere, sigma).clamp(0.005, 100)
