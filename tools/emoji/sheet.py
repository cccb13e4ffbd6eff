"""A sheet of pictures to look at: prompts in rows, settings in columns, and unconditional pictures with and without SAG."""
import argparse
import pathlib

import torch
from PIL import Image, ImageDraw

import evaluate
from diffusion import sample_euler
from guidance import Denoiser, Guidance

PROMPTS = ("red heart", "cat face", "smiling face with sunglasses", "rocket", "pizza", "octopus", "rainbow", "panda", "bicycle", "red apple", "pile of poo",
           "sunflower", "green cat face", "blue fire")
SETTINGS = (("cfg 1", Guidance(cfg=1)), ("cfg 2", Guidance(cfg=2)), ("cfg 2 + SAG 1", Guidance(cfg=2, scale=1)), ("cfg 4", Guidance(cfg=4)))
UNCONDITIONAL = (("no SAG", Guidance()), ("SAG 1", Guidance(scale=1)), ("SAG 2", Guidance(scale=2)), ("SAG 4", Guidance(scale=4)))
TILE, LEFT = 66, 190


def to_image(picture):
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).cpu().numpy())


def paste(rows, headings):
    """rows: (label, pictures); the headings share the width."""
    width = TILE * max(len(pictures) for _, pictures in rows)
    sheet = Image.new("RGB", (LEFT + width, 22 + TILE * len(rows)), (235, 235, 235))
    pen = ImageDraw.Draw(sheet)
    for i, heading in enumerate(headings):
        pen.text((LEFT + i * width // len(headings), 5), heading, fill=(0, 0, 0))
    for y, (label, pictures) in enumerate(rows):
        pen.text((5, 48 + TILE * y), label, fill=(0, 0, 0))
        for x, picture in enumerate(pictures):
            sheet.paste(to_image(picture), (LEFT + TILE * x, 23 + TILE * y))
    return sheet


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, type=pathlib.Path)
    parser.add_argument("--out", required=True, type=pathlib.Path)
    parser.add_argument("--each", type=int, default=4, help="pictures of a prompt and setting")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network, encoder = evaluate.load_model(options.model, device)
    random = torch.Generator().manual_seed(options.seed)

    def draw(prompts, guidance, noise):
        condition, empty = torch.cat([encoder.encode(prompt) for prompt in prompts]), encoder.encode("").repeat(len(noise), 1, 1)
        return sample_euler(Denoiser(network, condition, empty, guidance), noise, options.steps)

    noise = torch.randn(options.each, 3, 64, 64, generator=random).to(device)
    columns = [draw([p for p in PROMPTS for _ in noise], guidance, noise.repeat(len(PROMPTS), 1, 1, 1)) for _, guidance in SETTINGS]
    rows = [(prompt, torch.cat([c[i * options.each:(i + 1) * options.each] for c in columns])) for i, prompt in enumerate(PROMPTS)]
    paste(rows, [name for name, _ in SETTINGS]).save(options.out / "prompts.png")
    noise = torch.randn(4 * options.each, 3, 64, 64, generator=random).to(device)
    rows = [(name, draw([""] * len(noise), guidance, noise)) for name, guidance in UNCONDITIONAL]
    paste(rows, ["unconditional"]).save(options.out / "unconditional.png")


if __name__ == "__main__":
    main()
