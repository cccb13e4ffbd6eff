"""Train the UNet and the text encoder together."""

import argparse
import time

import torch
import torch.nn.functional as F

import diffusion
import schedule
from data import Captions, Glyphs
from network import UNet
from text import TextEncoder

# Of the moving average that ships.
DECAY = 0.9985


class Model(torch.nn.Module):
    """Both networks as one: (noisy picture, sigma, caption) -> the UNet's raw output."""

    def __init__(self):
        super().__init__()
        self.unet, self.encoder = UNet(), TextEncoder()

    def forward(self, x, c_noise, trigrams, words):
        return self.unet(x, c_noise, self.encoder(trigrams, words))


def loss_of(model, pictures, caption):
    sigma = diffusion.training_sigmas(len(pictures), pictures.device)[:, None, None, None]
    c_skip, c_out, c_in, c_noise = diffusion.preconditioning(sigma)
    x = pictures + sigma * torch.randn_like(pictures)
    with torch.autocast(pictures.device.type, torch.bfloat16):
        output = model(c_in * x, c_noise.flatten(), *caption)
    return F.mse_loss(output.float(), (pictures - c_skip * x) / c_out)


def compiled(model, glyphs, captions, batch):
    """The model in torch.compile, or the model itself if that does not work (without a compiler,
    for example)."""
    started = time.time()
    try:
        faster = torch.compile(model)
        pictures, glyph = glyphs.batch(batch)
        loss_of(faster, pictures, captions.batch(glyph)).backward()
        print(f"compiled in {time.time() - started:.0f} s", flush=True)
        return faster
    # torch.compile has no common error type.
    except Exception as error:
        print(f"not compiled: {error}", flush=True)
        return model
    finally:
        model.zero_grad()


def train(glyphs, options):
    """The moving average of the weights after all steps."""
    torch.manual_seed(options.seed)
    device = glyphs.real.device
    model = Model().to(device, memory_format=torch.channels_last)
    captions = Captions(glyphs.captions, model.encoder, device)
    parameters = list(model.parameters())
    average = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    started = time.time()
    forward = compiled(model, glyphs, captions, options.batch) if options.compile else model
    minutes = options.minutes - (time.time() - started) / 60 if options.minutes else None
    torch.manual_seed(options.seed)
    total = torch.zeros((), device=device)
    for step, progress in schedule.steps(options.steps, minutes):
        schedule.set_rate(optimizer, 1.5e-3 * schedule.cosine(progress, step, warmup=300))
        pictures, glyph = glyphs.batch(options.batch)
        loss = loss_of(forward, pictures, captions.batch(glyph))
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        # Skips a broken step without waiting for the device.
        optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        optimizer.step()
        torch._foreach_lerp_(
            average,
            [parameter.detach() for parameter in parameters],
            1 - min(DECAY, (1 + step) / (10 + step)),
        )
        total += loss.detach()
        # Without this the clock of schedule.steps runs ahead of the device.
        if (step + 1) % 100 == 0 and device.type == "cuda":
            torch.cuda.synchronize()
        if (step + 1) % options.report == 0:
            seconds = time.time() - started
            print(
                f"step {step + 1} loss {total.item() / options.report:.4f} "
                f"{(step + 1) * options.batch / seconds:.0f} pictures/s {seconds:.0f} s",
                flush=True,
            )
            total.zero_()
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
    return model, {
        "steps": step + 1,
        "pictures": (step + 1) * options.batch,
        "seconds": round(time.time() - started),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--glyphs", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--steps", type=int, default=8500)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--minutes", type=float, help="stop after this time at the latest")
    parser.add_argument("--limit", type=int, help="use only this many glyphs")
    parser.add_argument("--report", type=int, default=250)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args()
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, facts = train(Glyphs(options.glyphs, device, options.limit), options)
    state = {key: value.cpu() for key, value in model.state_dict().items()}
    torch.save({"state": state, "facts": facts}, options.out)
    print(facts, flush=True)


if __name__ == "__main__":
    main()
