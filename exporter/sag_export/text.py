"""Text encoders that C++ can call with a prompt: CLIP's tokenizer, scripted, and then the text
models, traced."""

import torch
from torch import Tensor, nn

from sag_export.mistake import Mistake
from sag_export.tokenizer import ClipTokenizer, vector_ids

# Layers and width of Stable Diffusion 2's. Its folder leaves out the last of OpenCLIP-H's 24
# layers, and other programs count it.
WITHOUT_LAST = (23, 1024)


class States(nn.Module):
    """Ids to what each layer gives, the last one first, [layers, tokens, width], and to the pooled
    text [1, features]. `final_norm`: after the final layer norm."""

    def __init__(self, model, final_norm: bool):
        super().__init__()
        self.model, self.final_norm = model, final_norm

    def forward(self, ids):
        out = self.model(ids, output_hidden_states=True)
        states = torch.cat(out.hidden_states[:0:-1])
        if self.final_norm:
            states = self.model.text_model.final_layer_norm(states)
        return states, out.text_embeds if "text_embeds" in out else out.pooler_output


class Clip(nn.Module):
    """A tokenizer and its text model. A layer is counted from the end, 1 is the last one."""

    def __init__(self, tokenizer, states, layers: int, first: int, default: int):
        """`first`: the layer that `states` gives first; `default`: the one that the UNet knows."""
        super().__init__()
        self.tokenizer, self.states = tokenizer, states
        self.layers, self.first, self.default = layers, first, default

    def forward(
        self, pieces: list[str], weights: list[float], clip_skip: int
    ) -> tuple[Tensor, Tensor]:
        """The context [1, tokens, width] after a layer (0: the default), and the pooled text."""
        layer = clip_skip if clip_skip != 0 else self.default
        i = layer - self.first
        if i < 0 or i >= self.layers:
            raise ValueError("clip_skip must be in clip_skip_range(), or 0")
        ids, token_weights = self.tokenizer.weighted_ids(pieces, weights)
        states, pooled = self.states(ids)
        context = states[i : i + 1]
        weighted = token_weights != 1.0
        if bool(weighted.any()):
            # Away from an empty text, as ComfyUI does.
            empty = self.states(self.tokenizer.ids(""))[0][i : i + 1]
            context = torch.where(weighted, (context - empty) * token_weights + empty, context)
        return context, pooled

    @torch.jit.export
    def cut_pieces(self, pieces: list[str]) -> str:
        return self.tokenizer.cut_pieces(pieces)


class TextEncoder(nn.Module):
    """Stable Diffusion 1 and 2."""

    def __init__(self, clip: Clip):
        super().__init__()
        self.clip = clip

    @torch.jit.export
    def encode(self, prompt: str) -> Tensor:
        return self.encode_pieces([prompt], [1.0], 0)

    @torch.jit.export
    def encode_pieces(self, pieces: list[str], weights: list[float], clip_skip: int) -> Tensor:
        """The context of pieces of a prompt, each with its weight. clip_skip: the layer, counted
        from the end (1: the last); 0: the model's own."""
        return self.clip(pieces, weights, clip_skip)[0]

    @torch.jit.export
    def clip_skip_range(self) -> tuple[int, int]:
        """The lowest and the highest."""
        return self.clip.first, self.clip.first + self.clip.layers - 1

    @torch.jit.export
    def cut(self, prompt: str) -> str:
        """The part of the prompt that does not fit."""
        return self.cut_pieces([prompt])

    @torch.jit.export
    def cut_pieces(self, pieces: list[str]) -> str:
        return self.clip.cut_pieces(pieces)


class TextAndSizeEncoder(nn.Module):
    """SDXL. `factor`: pixels per cell of the latent."""

    def __init__(self, clip: Clip, clip_2: Clip, factor: int):
        super().__init__()
        self.clip, self.clip_2, self.factor = clip, clip_2, factor

    @torch.jit.export
    def encode(self, prompt: str, height: int, width: int) -> tuple[Tensor, Tensor]:
        """The context, and y: the pooled text and the picture's size, for a latent of this height
        and width."""
        return self.encode_pieces([prompt], [1.0], 0, height, width)

    @torch.jit.export
    def encode_pieces(
        self, pieces: list[str], weights: list[float], clip_skip: int, height: int, width: int
    ) -> tuple[Tensor, Tensor]:
        """The same of pieces of a prompt, each with its weight, which y does not know. clip_skip:
        the layer, counted from the end (1: the last); 0: the model's own."""
        context = self.clip(pieces, weights, clip_skip)[0]
        context_2, pooled = self.clip_2(pieces, weights, clip_skip)
        high, wide = float(height * self.factor), float(width * self.factor)
        size = torch.tensor([[high, wide, 0.0, 0.0, high, wide]], dtype=pooled.dtype)
        return torch.cat([context, context_2], dim=-1), torch.cat([pooled, size], dim=-1)

    @torch.jit.export
    def clip_skip_range(self) -> tuple[int, int]:
        """The lowest and the highest."""
        return self.clip.first, self.clip.first + min(self.clip.layers, self.clip_2.layers) - 1

    @torch.jit.export
    def cut(self, prompt: str) -> str:
        """The part of the prompt that does not fit."""
        return self.cut_pieces([prompt])

    @torch.jit.export
    def cut_pieces(self, pieces: list[str]) -> str:
        # An added token may stand for more vectors in one of the two.
        cut, cut_2 = self.clip.cut_pieces(pieces), self.clip_2.cut_pieces(pieces)
        return cut if len(cut) > len(cut_2) else cut_2


def tokens_of(tokenizer, model):
    return min(tokenizer.model_max_length, model.config.max_position_embeddings)


def check_knows_all_tokens(tokenizer, model):
    known = model.get_input_embeddings().num_embeddings
    if len(tokenizer) > known:
        last = tokenizer.convert_ids_to_tokens(len(tokenizer) - 1)
        raise Mistake(
            f'The tokenizer has {len(tokenizer)} tokens (the last one is "{last}"), but the text '
            f"encoder has vectors for {known}: save both of them after a token is added."
        )


def make_clip(tokenizer, model, last_state):
    """`last_state`: whether the UNet knows the last layer's, after the final norm; else it is the
    one before, without it."""
    check_knows_all_tokens(tokenizer, model)
    scripted = torch.jit.script(ClipTokenizer(tokenizer, tokens_of(tokenizer, model)))
    states = torch.jit.trace(
        States(model, last_state), scripted.ids("an example"), check_trace=False
    )
    layers = model.config.num_hidden_layers
    first = 2 if last_state and (layers, model.config.hidden_size) == WITHOUT_LAST else 1
    return Clip(scripted, states, layers, first, first if last_state else 2)


def make_text_encoder(tokenizer, model):
    """Scripted; `tokenizer`: a CLIPTokenizerFast, `model`: a CLIPTextModel, in fp32 on the CPU."""
    return torch.jit.script(TextEncoder(make_clip(tokenizer, model, last_state=True)))


def make_text_and_size_encoder(tokenizer, model, tokenizer_2, model_2, factor):
    if tokens_of(tokenizer, model) != tokens_of(tokenizer_2, model_2):
        raise Mistake("The two text encoders must read the same number of tokens.")
    clips = [make_clip(*pair, False) for pair in ((tokenizer, model), (tokenizer_2, model_2))]
    return torch.jit.script(TextAndSizeEncoder(*clips, factor))


def vectors(tokenizer):
    """The added tokens that stand for several vectors, as the text that names each of them."""
    ids = vector_ids([{"content": c, "id": i} for c, i in tokenizer.added_tokens_encoder.items()])
    return {
        token: " ".join([token, *(f"{token}_{i}" for i in range(1, len(its)))])
        for token, its in ids.items()
        if len(its) > 1
    }


@torch.no_grad()
def expected(prompt, tokenizer, model, tokenizer_2=None, model_2=None, size=None):
    """What diffusers' pipelines compute: the context; for SDXL the context and y, for a picture of
    this `size` (height, width). The token of a textual inversion must be the whole prompt."""

    def ids(tokenizer, model):
        length = tokens_of(tokenizer, model)
        return tokenizer(
            vectors(tokenizer).get(prompt, prompt),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        ).input_ids

    if model_2 is None:
        return model(ids(tokenizer, model))[0]
    first = model(ids(tokenizer, model), output_hidden_states=True).hidden_states[-2]
    second = model_2(ids(tokenizer_2, model_2), output_hidden_states=True)
    numbers = torch.tensor([[*size, 0, 0, *size]], dtype=torch.float32)
    return torch.cat([first, second.hidden_states[-2]], dim=-1), torch.cat(
        [second[0], numbers], dim=-1
    )
