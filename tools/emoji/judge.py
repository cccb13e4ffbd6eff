"""The judge: a small network that names a glyph. Its last hidden layer is the space that distances
are measured in."""

import argparse
import time

import torch
import torch.nn.functional as F
from torch import nn

import schedule
from data import Glyphs


class Judge(nn.Module):
    def __init__(self, glyphs, widths=(32, 64, 96, 160), features=128):
        super().__init__()
        layers, inputs = (
            [
                nn.Conv2d(3, widths[0], 3, padding=1, bias=False),
                nn.BatchNorm2d(widths[0]),
                nn.ReLU(),
            ],
            widths[0],
        )
        for width in widths:
            for source, stride in ((inputs, 2), (width, 1)):
                layers += [
                    nn.Conv2d(source, width, 3, stride, 1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.ReLU(),
                ]
            inputs = width
        self.body = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(4 * inputs, features), nn.BatchNorm1d(features))
        self.name = nn.Linear(features, glyphs)

    def forward(self, pictures):
        """Features, scores."""
        features = self.hidden(self.body(pictures))
        return features, self.name(F.relu(features))


@torch.no_grad()
def look(judge, pictures):
    """Features and the named glyph of each picture."""
    results = [judge(part.clamp(-1, 1)) for part in pictures.split(512)]
    return torch.cat([features for features, _ in results]), torch.cat(
        [scores.argmax(1) for _, scores in results]
    )


def load(path, device):
    state = torch.load(path, map_location=device)
    judge = Judge(len(state["name.bias"])).to(device).eval()
    judge.load_state_dict(state)
    return judge


def disturbed(pictures):
    """A little noise and contrast, so that a generated picture is not foreign to the judge."""
    strength = torch.rand(len(pictures), 1, 1, 1, device=pictures.device) ** 2 * 0.15
    contrast = 0.9 + 0.2 * torch.rand(len(pictures), 1, 1, 1, device=pictures.device)
    return ((pictures + torch.randn_like(pictures) * strength - 1) * contrast + 1).clamp(-1, 1)


def train(glyphs, steps, batch, seed, minutes):
    torch.manual_seed(seed)
    device = glyphs.real.device
    judge = Judge(glyphs.count).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), weight_decay=0.02, fused=True)
    started = time.time()
    for step, progress in schedule.steps(steps, minutes):
        schedule.set_rate(optimizer, 4e-3 * schedule.cosine(progress, step, warmup=50))
        pictures, glyph = glyphs.batch(batch, shift=4, shifted=0.8, scaled=0.6)
        with torch.autocast(device.type, torch.bfloat16):
            _, scores = judge(disturbed(pictures))
        loss = F.cross_entropy(scores.float(), glyph, label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 200 == 0:
            print(
                f"judge step {step} loss {loss.item():.3f} {time.time() - started:.0f} s",
                flush=True,
            )
    return judge.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glyphs", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--minutes", type=float, help="stop after this time at the latest")
    parser.add_argument("--limit", type=int, help="use only this many glyphs")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    glyphs = Glyphs(options.glyphs, device, options.limit)
    judge = train(glyphs, options.steps, options.batch, options.seed, options.minutes)
    torch.save({key: value.cpu() for key, value in judge.state_dict().items()}, options.out)
    right = (
        (look(judge, glyphs.real)[1] == torch.arange(glyphs.count, device=device))
        .float()
        .mean()
        .item()
    )
    print(f"judge names {right:.4%} of the real glyphs", flush=True)


if __name__ == "__main__":
    main()
