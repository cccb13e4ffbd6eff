"""SAG in Python, for measuring the model only: guidance with the controls that tell what the attention map is worth."""
import dataclasses
import math
from typing import Optional

import torch
import torch.nn.functional as F

import diffusion


@dataclasses.dataclass(frozen=True)
class Guidance:
    cfg: Optional[float] = None  # None: unconditional
    scale: float = 0.0
    blur: float = 2.0
    mask: str = "attention"  # or inverse, random (as many tokens at random places), everywhere
    window: tuple = (0.0, math.inf)  # sigmas that are guided
    interval: int = 1
    one_pass: bool = False  # the perturbation of the previous guided step


def gaussian_blur(x, sigma, radius=4):
    weights = torch.exp(-0.5 * (torch.arange(-radius, radius + 1, device=x.device) / sigma)**2)
    weights = (weights / weights.sum()).to(x.dtype).expand(x.shape[1], 1, 1, -1)
    x = F.pad(x, (radius,) * 4, mode="reflect")
    return F.conv2d(F.conv2d(x, weights, groups=x.shape[1]), weights.transpose(2, 3), groups=x.shape[1])


class Denoiser:
    """denoised = denoiser(x, sigma) for one batch. `network` returns its output and the attention map."""

    def __init__(self, network, condition, empty, guidance, seed=0):
        self.network, self.condition, self.empty, self.guidance = network, condition, empty, guidance
        self.random = torch.Generator(empty.device).manual_seed(seed)
        self.step, self.previous, self.evaluations = -1, None, 0

    def predict(self, x, sigma, context):
        c_skip, c_out, c_in, c_noise = diffusion.preconditioning(torch.tensor(sigma, device=x.device))
        scaled = (c_in * x).to(context.dtype, memory_format=torch.channels_last)
        output, attention = self.network(scaled, c_noise.expand(len(x)), context)
        self.evaluations += 1
        return c_skip * x + c_out * output.float(), attention.clone()

    def mask(self, attention, shape):
        """[N, 1, H, W] of the [N, tokens] map; the 64x64 pictures have square token grids."""
        chosen = attention > 1.0
        kind = self.guidance.mask
        if kind == "everywhere":
            chosen = torch.ones_like(chosen)
        elif kind == "inverse":
            chosen = ~chosen
        elif kind == "random":
            order = torch.rand(chosen.shape, device=chosen.device, generator=self.random).argsort(1).argsort(1)
            chosen = order < chosen.sum(1, keepdim=True)
        side = math.isqrt(chosen.shape[1])
        return F.interpolate(chosen.float().view(-1, 1, side, side), shape, mode="nearest")

    def combine(self, conditional, unconditional):
        if self.guidance.cfg is None:
            return unconditional
        if self.guidance.cfg == 1:
            return conditional
        return unconditional + self.guidance.cfg * (conditional - unconditional)

    def __call__(self, x, sigma):
        guidance = self.guidance
        self.step += 1
        low, high = guidance.window
        guided = guidance.scale != 0 and low <= sigma <= high and self.step % guidance.interval == 0
        conditional = unconditional = None
        if guidance.cfg is not None:
            conditional, _ = self.predict(x, sigma, self.condition)
        if guidance.cfg != 1 or guided:
            unconditional, attention = self.predict(x, sigma, self.empty)
        denoised = self.combine(conditional, unconditional)
        if not guided:
            return denoised
        change = self.mask(attention, x.shape[2:]) * (gaussian_blur(unconditional, guidance.blur) - unconditional)
        used = self.previous if guidance.one_pass and self.previous is not None else change
        self.previous = change
        worse, _ = self.predict(x + used, sigma, self.empty)
        return denoised + guidance.scale * (unconditional + used - worse)
