"""Real pictures, what the judge sees in them, and the noise sets, for quality.py."""

import math
import statistics

import torch

import judge as judging
from data import Glyphs


def gaussian(features):
    """Mean and covariance of feature vectors [N, C]."""
    return features.double().mean(0), torch.cov(features.double().T)


def distance(one, other):
    """Fréchet distance of two Gaussians."""
    (mean1, cov1), (mean2, cov2) = one, other
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2) ** 2).sum().add(cov1.trace() + cov2.trace() - 2 * overlap).item()


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return [statistics.fmean(values), error]


class Gallery:
    """`options`: of quality.py."""

    def __init__(self, options, device):
        self.options = options
        self.glyphs = Glyphs(options.glyphs, device, options.limit)
        self.judge = judging.load(options.judge, device)
        torch.manual_seed(options.seed)
        self.real = torch.cat([self.look_at_real(1000) for _ in range(options.real // 1000)])
        named = judging.look(self.judge, self.glyphs.real)[1]
        right = named == torch.arange(self.glyphs.count, device=device)
        self.facts = {
            "judge_top1_on_real_glyphs": right.float().mean().item(),
            "floors": self.floors(),
        }

    def look_at_real(self, count, glyph=None):
        return judging.look(self.judge, self.glyphs.batch(count, glyph=glyph)[0])[0]

    def floors(self, draws=6):
        """The distance of real pictures, as many as in a noise set: with random glyphs, and with
        the glyphs of a noise set."""
        count, real = self.options.pictures, gaussian(self.real)
        at_random = [distance(gaussian(self.look_at_real(count)), real) for _ in range(draws)]
        named = [
            distance(gaussian(self.look_at_real(count, self.noise_set(number)[0])), real)
            for number in range(draws)
        ]
        return {"at_random": mean_and_error(at_random), "named": mean_and_error(named)}

    def noise_set(self, number):
        """Different glyphs as long as there are any, and their noise."""
        device, count = self.real.device, self.options.pictures
        random = torch.Generator().manual_seed(1000 + number)
        orders = [
            torch.randperm(self.glyphs.count, generator=random)
            for _ in range(1 + count // self.glyphs.count)
        ]
        noise = torch.randn(count, 3, self.glyphs.side, self.glyphs.side, generator=random)
        return torch.cat(orders)[:count].to(device), noise.to(device)
