"""A network to export: a module, and what it takes."""

import dataclasses

import torch

from sag_export.attention import (
    cross_attentions,
    scripted_attentions,
    self_attentions,
    without_second_prompt,
)
from sag_export.mistake import Mistake


@dataclasses.dataclass
class Concat:
    """The further channels of an inpainting UNet and the like."""

    channels: int
    # What sag-sample fills them with, "inpaint" or "edit"; None: the user's tensor.
    kind: str | None = None
    # The latent of the picture times this.
    scale: float = 1.0


@dataclasses.dataclass
class Network:
    """`module`'s forward takes x [rows, channels, height, width], timesteps [rows] fp32, then
    context [rows, tokens, width], y [rows, features], class_labels [rows] int64 and timestep_cond
    [rows, guidance] if there are any, and returns a tensor of the latent's shape: x's, without the
    channels of `concat`."""

    module: torch.nn.Module
    # Channels, height and width of the default latent.
    shape: tuple[int, int, int]
    # Tokens and width.
    context: tuple[int, int] | None
    # How many numbers y holds.
    features: int | None
    # Height and width must be multiples of it.
    multiple: int = 1
    # With multiples of this one the module takes no detour. Compiled packages take nothing else.
    fastest_multiple: int = 1
    # What x holds after the latent's channels.
    concat: Concat | None = None
    # How many classes there are; 0: any whole number is one. None: it takes no class_labels.
    classes: int | None = None
    # How many numbers timestep_cond, the embedded scale of guidance, holds; None: it takes none.
    guidance: int | None = None

    def example(self, rows, height, width, seed=0, prompts=1):
        """Name → random tensor, in the order of forward, with the device and dtype of the module's
        weights. The context holds that many prompts, one after the other. With a seed the timesteps
        rise, without one they fall, so that a branch on them goes another way than in the trace."""
        weight = next(p for p in self.module.parameters() if p.is_floating_point())
        random = torch.Generator().manual_seed(seed)

        def tensor(*shape):
            drawn = torch.randn(shape, generator=random, dtype=torch.float32, device="cpu")
            return drawn.to(weight.device, weight.dtype)

        inputs = {"x": tensor(rows, self.channels(), height, width)}
        first, last = (20.0, 980.0) if seed else (900.0, 100.0)
        inputs["timesteps"] = torch.linspace(
            first, last, rows, dtype=torch.float32, device=weight.device
        )
        if self.context:
            tokens, width_of_token = self.context
            inputs["context"] = tensor(rows, prompts * tokens, width_of_token)
        if self.features:
            inputs["y"] = tensor(rows, self.features)
        if self.classes is not None:
            labels = torch.randint(self.classes or 1000, (rows,), generator=random)
            inputs["class_labels"] = labels.to(weight.device)
        if self.guidance:
            inputs["timestep_cond"] = tensor(rows, self.guidance)
        return inputs

    def channels(self):
        """Of x."""
        return self.shape[0] + (self.concat.channels if self.concat else 0)

    def small_sizes(self):
        """Two latent sizes (height, width) that cost little to try. The first one is for tracing:
        it takes every detour that there is."""
        step = max(self.fastest_multiple, self.multiple)
        if self.multiple == step:
            return (2 * step, 3 * step), (4 * step, step * 2)
        return (2 * step + 1, 3 * step - 1), (2 * step, 3 * step)

    def sites(self):
        """Its self-attentions as [(ordinal, dotted path)]. Throws Mistake if there are others that
        Python does not see: they would be left out of the numbering, too."""
        for path in scripted_attentions(self.module):
            raise Mistake(
                f'The attention of "{path}" cannot be seen, because that part is TorchScript: '
                "return the module as it is without torch.jit.script and torch.jit.trace, or save "
                'the whole as TorchScript yourself (docs/models.md, "Files you already have").'
            )
        return self_attentions(self.module, tuple(self.example(1, *self.small_sizes()[0]).values()))

    def cross_sites(self):
        """The dotted paths of all cross-attentions. Throws Mistake if there are none, or if
        something else reads the context: it would see both prompts where there are two."""
        size = self.small_sizes()[0]
        paths = cross_attentions(self.module, tuple(self.example(1, *size).values()))
        if not paths or not self.context:
            raise Mistake("--cross-attention needs modules called attn2, and the network has none.")
        two = self.example(1, *size, prompts=2)
        one = {**two, "context": two["context"][:, : self.context[0]]}
        with torch.no_grad():
            expected = self.module(*one.values())
        got = without_second_prompt(self.module, tuple(two.values()), paths)
        tolerance = 1e-4 if expected.dtype == torch.float32 else 2e-2
        if (got - expected).abs().max() > tolerance * expected.abs().max():
            raise Mistake(
                "--cross-attention needs a network whose context is read by modules called attn2 "
                "alone, and this one reads it elsewhere, too."
            )
        return paths

    def convolution_share(self):
        """The share of parameters with four dimensions, which channels last lays out differently.
        The library counts in the same way (convolution_share in src/unet)."""
        parameters = list(self.module.parameters())
        return sum(p.numel() for p in parameters if p.dim() == 4) / sum(
            p.numel() for p in parameters
        )

    def check(self):
        """Throws Mistake unless the module runs and returns numbers of x's shape."""
        inputs = self.example(2, *self.small_sizes()[0])
        with torch.no_grad():
            try:
                out = self.module(*inputs.values())
            except Exception as error:
                shapes = ", ".join(f"{name} {list(t.shape)}" for name, t in inputs.items())
                raise Mistake(f"The network fails for {shapes}: {first_line(error)}") from error
        if not isinstance(out, torch.Tensor):
            raise Mistake(f"The network's forward must return a tensor, got {type(out).__name__}.")
        expected = [2, self.shape[0], *inputs["x"].shape[2:]]
        if list(out.shape) != expected:
            raise Mistake(
                f"The network must return the latent's shape, {expected}, got {list(out.shape)}."
            )
        if not out.isfinite().all():
            raise Mistake(
                "The network must return finite numbers, but gives NaN or infinity for random "
                "inputs; try another --dtype."
            )


def first_line(error):
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
