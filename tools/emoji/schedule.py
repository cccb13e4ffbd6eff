"""The progress of a training, and its learning rate."""

import math
import time


def steps(count, minutes=None):
    """Yields (step, progress in 0 ... 1): `count` steps, or fewer if `minutes` are over first."""
    started = time.time()
    for step in range(count):
        progress = step / count
        if minutes:
            progress = max(progress, (time.time() - started) / (60 * minutes))
        if progress >= 1:
            return
        yield step, progress


def cosine(progress, step, warmup):
    return min(1.0, (step + 1) / warmup) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate
