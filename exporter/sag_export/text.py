"""Text encoders that C++ can call with a prompt: CLIP's tokenizer, scripted, and then the text
models, traced."""

import torch
from torch import Tensor, nn

from sag_export.mistake import Mistake
from sag_export.tokenizer import ClipTokenizer


class LastState(nn.Module):
    """Stable Diffusion 1 and 2: [1, tokens, width]."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids).last_hidden_state


class StateBeforeLast(nn.Module):
    """SDXL's first."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        return self.model(ids, output_hidden_states=True).hidden_states[-2]


class StateBeforeLastAndPooled(nn.Module):
    """SDXL's second, a CLIPTextModelWithProjection."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, ids):
        out = self.model(ids, output_hidden_states=True)
        return out.hidden_states[-2], out.text_embeds


class TextEncoder(nn.Module):
    def __init__(self, tokenizer, model):
        super().__init__()
        self.tokenizer, self.model = tokenizer, model

    @torch.jit.export
    def encode(self, prompt: str) -> Tensor:
        return self.model(self.tokenizer.ids(prompt))

    @torch.jit.export
    def cut(self, prompt: str) -> str:
        """The part of the prompt that does not fit."""
        return self.tokenizer.cut(prompt)


class TextAndSizeEncoder(nn.Module):
    """`factor`: pixels per cell of the latent."""

    def __init__(self, tokenizer, model, tokenizer_2, model_2, factor: int):
        super().__init__()
        self.tokenizer, self.model = tokenizer, model
        self.tokenizer_2, self.model_2 = tokenizer_2, model_2
        self.factor = factor

    @torch.jit.export
    def encode(self, prompt: str, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The context, and y: the pooled text and the picture's size, for a latent of this height
        and width."""
        context, pooled = self.model_2(self.tokenizer_2.ids(prompt))
        context = torch.cat([self.model(self.tokenizer.ids(prompt)), context], dim=-1)
        high, wide = float(height * self.factor), float(width * self.factor)
        size = torch.tensor([[high, wide, 0.0, 0.0, high, wide]], dtype=pooled.dtype)
        return context, torch.cat([pooled, size], dim=-1)

    @torch.jit.export
    def cut(self, prompt: str) -> str:
        """The part of the prompt that does not fit."""
        return self.tokenizer.cut(prompt)


def tokens_of(tokenizer, model):
    return min(tokenizer.model_max_length, model.config.max_position_embeddings)


def traced(module, tokenizer):
    return torch.jit.trace(module, tokenizer.ids("an example"), check_trace=False)


def make_text_encoder(tokenizer, model):
    """Scripted; `tokenizer`: a CLIPTokenizerFast, `model`: a CLIPTextModel, in fp32 on the CPU."""
    scripted = torch.jit.script(ClipTokenizer(tokenizer, tokens_of(tokenizer, model)))
    return torch.jit.script(TextEncoder(scripted, traced(LastState(model), scripted)))


def make_text_and_size_encoder(tokenizer, model, tokenizer_2, model_2, factor):
    tokens = tokens_of(tokenizer, model)
    if tokens != tokens_of(tokenizer_2, model_2):
        raise Mistake("The two text encoders must read the same number of tokens.")
    first, second = (torch.jit.script(ClipTokenizer(t, tokens)) for t in (tokenizer, tokenizer_2))
    models = (
        traced(StateBeforeLast(model), first),
        traced(StateBeforeLastAndPooled(model_2), second),
    )
    return torch.jit.script(TextAndSizeEncoder(first, models[0], second, models[1], factor))


@torch.no_grad()
def expected(prompt, tokenizer, model, tokenizer_2=None, model_2=None, size=None):
    """What diffusers' pipelines compute: the context; for SDXL the context and y, for a picture of
    this `size` (height, width)."""

    def ids(tokenizer, model):
        length = tokens_of(tokenizer, model)
        return tokenizer(
            prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids

    if model_2 is None:
        return model(ids(tokenizer, model))[0]
    first = model(ids(tokenizer, model), output_hidden_states=True).hidden_states[-2]
    second = model_2(ids(tokenizer_2, model_2), output_hidden_states=True)
    numbers = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), torch.cat(
        [second[0], numbers], dim=-1
    )
