"""EDM (Karras et al. 2022): x = x0 + sigma * noise, the preconditioning outside the network, Euler over Karras's schedule."""
import math

import torch

SIGMA_DATA, SIGMA_MIN, SIGMA_MAX, RHO = 0.5, 0.02, 60.0, 7.0


def preconditioning(sigma):
    """c_skip, c_out, c_in, c_noise of a tensor of sigmas."""
    total = sigma**2 + SIGMA_DATA**2
    return SIGMA_DATA**2 / total, sigma * SIGMA_DATA * total.rsqrt(), total.rsqrt(), sigma.log() / 4


def training_sigmas(count, device):
    """Log-normal where the picture is decided, one in ten log-uniform over everything."""
    sigma = torch.exp(torch.randn(count, device=device) * 1.3 - 0.8)
    anywhere = torch.exp(torch.rand(count, device=device) * math.log(80 / 0.02) + math.log(0.02))
    return torch.where(torch.rand(count, device=device) < 0.1, anywhere, sigma).clamp(0.005, 100)


def karras_sigmas(steps):
    ends = SIGMA_MAX**(1 / RHO), SIGMA_MIN**(1 / RHO)
    return [(ends[0] + i / max(steps - 1, 1) * (ends[1] - ends[0]))**RHO for i in range(steps)] + [0.0]


def sample_euler(denoiser, noise, steps):
    sigmas = karras_sigmas(steps)
    x = noise * sigmas[0]
    for now, following in zip(sigmas, sigmas[1:]):
        x = x + (x - denoiser(x, now)) * ((following - now) / now)
    return x
