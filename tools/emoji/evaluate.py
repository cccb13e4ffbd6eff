"""Measure the files that ship: which glyph the judge sees, and how far the pictures are from the real ones, with and without SAG.

Every row of the table draws the same noise and the same names. A noise set is 1000 pictures of different names; no two sets share noise,
and the spread over them gives the standard errors. `change` is against the row named `against`, set by set.
"""
import argparse
import datetime
import json
import math
import pathlib
import statistics
import time

import torch

import judge as judging
from data import Captions, Glyphs
from diffusion import sample_euler
from guidance import Denoiser, Guidance
from network import UNet, WithMap
from text import TextEncoder


def rows():
    """(name, guidance, name of the row it is compared with), in the order of the table."""
    table = [("cfg 1", Guidance(cfg=1), None), ("cfg 2", Guidance(cfg=2), None), ("cfg 4", Guidance(cfg=4), None),
             ("unconditional", Guidance(), None)]

    def add(base, cfg, *variants):
        for name, changes in variants:
            table.append((f"{base} + {name}", Guidance(cfg=cfg, **changes), base))

    def sag(*scales):
        return [(f"SAG {scale:g}", {"scale": scale}) for scale in scales]

    def controls(scale):
        start = f"SAG {scale:g}, "
        return [(start + "random mask of equal area", {"scale": scale, "mask": "random"}), (start + "blur everywhere", {"scale": scale, "mask": "everywhere"}),
                (start + "mask inverted", {"scale": scale, "mask": "inverse"}), (f"SAG {-scale:g} (negative scale)", {"scale": -scale})]

    def cheaper(scale):
        start = f"SAG {scale:g}, "
        return [(start + "0.3 <= sigma <= 5", {"scale": scale, "window": (0.3, 5.0)}), (start + "every 2nd step", {"scale": scale, "interval": 2}),
                (start + "one pass", {"scale": scale, "one_pass": True})]

    add("unconditional", None, *sag(0.5, 1, 2, 4), *controls(1), *controls(2), *cheaper(2), ("SAG 2, blur 1", {"scale": 2, "blur": 1.0}))
    add("cfg 1", 1, *sag(0.5, 1, 2), *controls(1), *cheaper(1))
    add("cfg 2", 2, *sag(0.5, 1, 2), ("SAG 1, random mask of equal area", {"scale": 1, "mask": "random"}), ("SAG -1 (negative scale)", {"scale": -1}))
    add("cfg 4", 4, *sag(1))
    return table


def gaussian(features):
    """Mean and covariance of feature vectors [N, C]."""
    return features.double().mean(0), torch.cov(features.double().T)


def distance(one, other):
    """Fréchet distance of two Gaussians."""
    (mean1, cov1), (mean2, cov2) = one, other
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return ((mean1 - mean2)**2).sum().add(cov1.trace() + cov2.trace() - 2 * overlap).item()


def frechet(features, real):
    return distance(gaussian(features), gaussian(real))


def load_model(folder, device):
    """The shipped weights in the Python modules, where the attention map can be read."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    unet, encoder = UNet(), TextEncoder()
    unet.load_state_dict(torch.jit.load(folder / "unet.ts", map_location="cpu").state_dict())
    encoder.load_state_dict(torch.jit.load(folder / "text_encoder.ts", map_location="cpu").state_dict())
    unet, encoder = (module.to(device, dtype).eval().requires_grad_(False) for module in (unet, encoder))
    return WithMap(unet.to(memory_format=torch.channels_last)), encoder


def compiled(network, batch, side, context):
    """Behind torch.compile where that works."""
    try:
        faster = torch.compile(network)
        x = torch.zeros(batch, 3, side, side, device=context.device, dtype=context.dtype).to(memory_format=torch.channels_last)
        faster(x, torch.zeros((), device=x.device).expand(batch), context.expand(batch, -1, -1).contiguous())
        return faster
    except Exception as error:  # torch.compile has no common error type
        print(f"not compiled: {error}", flush=True)
        return network


class Gallery:
    """Real pictures, the judge's view of them, and the noise sets."""

    def __init__(self, options, device):
        self.options = options
        self.glyphs = Glyphs(options.glyphs, device, options.limit)
        self.judge = judging.load(options.judge, device)
        torch.manual_seed(options.seed)
        self.real = torch.cat([self.look_at_real(1000) for _ in range(options.real // 1000)])
        named = judging.look(self.judge, self.glyphs.real)[1]
        self.facts = {"judge_top1_on_real_glyphs": (named == torch.arange(self.glyphs.count, device=device)).float().mean().item(),
                      "floors": self.floors()}

    def look_at_real(self, count, glyph=None):
        return judging.look(self.judge, self.glyphs.batch(count, glyph=glyph)[0])[0]

    def floors(self, draws=6):
        """The distance of real pictures, as many as in a noise set: glyphs at random, and glyphs named like a noise set's."""
        count = self.options.pictures
        at_random = [frechet(self.look_at_real(count), self.real) for _ in range(draws)]
        named = [frechet(self.look_at_real(count, self.noise_set(number)[0]), self.real) for number in range(draws)]
        return {"at_random": mean_and_error(at_random), "named": mean_and_error(named)}

    def noise_set(self, number):
        """Different glyphs as far as they last, and their noise."""
        device, count = self.real.device, self.options.pictures
        random = torch.Generator().manual_seed(1000 + number)
        glyphs = torch.cat([torch.randperm(self.glyphs.count, generator=random) for _ in range(1 + count // self.glyphs.count)])[:count]
        return glyphs.to(device), torch.randn(count, 3, self.glyphs.side, self.glyphs.side, generator=random).to(device)


class Bench(Gallery):
    """And the model."""

    def __init__(self, options, device):
        super().__init__(options, device)
        self.network, encoder = load_model(options.model, device)
        captions = Captions(self.glyphs.captions, encoder, device)
        self.condition = encoder(*captions.names(torch.arange(self.glyphs.count, device=device)))
        self.empty = encoder(*captions.empty())
        if options.compile:
            self.network = compiled(self.network, options.pictures, self.glyphs.side, self.empty)

    def measure(self, guidance, number, glyphs, noise):
        """Fréchet distance, top-1 and evaluations of one noise set."""
        empty = self.empty.expand(len(glyphs), -1, -1).contiguous()
        denoiser = Denoiser(self.network, self.condition[glyphs], empty, guidance, seed=number)
        features, named = judging.look(self.judge, sample_euler(denoiser, noise, self.options.steps))
        top1 = None if guidance.cfg is None else (named == glyphs).float().mean().item()
        return {"fd": frechet(features, self.real), "top1": top1, "evaluations": denoiser.evaluations}


def mean_and_error(values):
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return [statistics.fmean(values), error]


def paired(values, others):
    return mean_and_error([value - other for value, other in zip(values, others)])


def summary(results):
    """One entry a row: means over the noise sets with standard errors, changes paired by set.

    A control or a cheaper variant also says how far plain SAG of its scale is from it: negative where plain SAG is nearer to the real pictures.
    """
    lines, by_name = [], {name: [measured["fd"] for measured in results[name]] for name, _, _ in rows()}
    for name, _, against in rows():
        measured = results[name]
        line = {"name": name, "evaluations": measured[0]["evaluations"], "fd": mean_and_error(by_name[name]), "fd_of_sets": by_name[name]}
        if measured[0]["top1"] is not None:
            line["top1"] = mean_and_error([m["top1"] for m in measured])
        if against:
            line["against"] = against
            line["change"] = paired(by_name[name], by_name[against])
        plain = name.split(",")[0]
        if plain != name:
            line["plain_sag_minus_this"] = paired(by_name[plain], by_name[name])
        lines.append(line)
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--glyphs", required=True)
    parser.add_argument("--judge", required=True)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--sets", type=int, default=6)
    parser.add_argument("--pictures", type=int, default=1000, help="in a noise set")
    parser.add_argument("--real", type=int, default=20000, help="pictures that stand for the real distribution: shifted and scaled as in training")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--minutes", type=float, help="start no further noise set that would end after this time")
    parser.add_argument("--limit", type=int, help="use only this many glyphs")
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    started = time.time()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    results = {name: [] for name, _, _ in rows()}
    with torch.no_grad():
        bench = Bench(options, device)
        for number in range(options.sets):
            began, noise_set = time.time(), bench.noise_set(number)
            for name, guidance, _ in rows():
                results[name].append(bench.measure(guidance, number, *noise_set))
                print(f"set {number} {name}: {results[name][-1]} {time.time() - started:.0f} s", flush=True)
            report = {"date": datetime.date.today().isoformat(), "sampler": f"Euler, {options.steps} steps", "pictures_in_a_set": options.pictures,
                      "sets": number + 1, "glyphs": bench.glyphs.count, **bench.facts, "rows": summary(results)}
            options.out.write_text(json.dumps(report, indent=1) + "\n")
            if options.minutes and 2 * time.time() - began - started > 60 * options.minutes:
                break


if __name__ == "__main__":
    main()
