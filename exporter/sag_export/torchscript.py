"""The TorchScript files of a model directory."""

import torch

from sag_export import archive, text, vae
from sag_export.attention import without_fast_path
from sag_export.check import check_calls, check_equal
from sag_export.mistake import Mistake
from sag_export.network import first_line

PROMPTS = ("", "a cat", "It's 2 o'clock — über-schnell! 🚀")


@torch.no_grad()
def write_unet(network, path):
    """Traces the network and checks the file with other batches, timesteps and sizes, including the
    default size."""
    traced_with, other = network.small_sizes()
    try:
        with without_fast_path():
            example = tuple(network.example(2, *traced_with).values())
            traced = torch.jit.trace(network.module, example, check_trace=False)
    # The module is not ours: it may raise anything.
    except Exception as error:
        raise Mistake(f"The network cannot be traced: {first_line(error)}") from error
    archive.save(traced, path)
    tried = ((1, other), (3, traced_with), (1, network.shape[1:]))
    calls = [tuple(network.example(rows, *size, seed=1).values()) for rows, size in tried]
    weight = calls[0][0]
    check_calls(
        path.name,
        torch.jit.load(str(path), map_location=weight.device),
        network.module,
        calls,
        weight.dtype,
    )


def check_ordinal(path, site):
    """Throws Mistake if the library may count the attentions of the file in another way. It finds
    those that are written out, too, which Python does not see."""
    if "::softmax(" in str(torch.jit.load(str(path), map_location="cpu").inlined_graph):
        raise Mistake(
            f"The attention {site} is in no module of its own, and the network also has a softmax, "
            "which may belong to another one: its number would not be certain. Put the attention "
            "into a module that has a name."
        )


@torch.no_grad()
def write_vae(autoencoder, folder):
    """decoder.ts and encoder.ts."""
    channels, factor = autoencoder.config.latent_channels, vae.factor_of(autoencoder)
    parts = (
        ("decoder", vae.Decoder(autoencoder), channels, 1),
        ("encoder", vae.Encoder(autoencoder), 3, factor),
    )
    for name, module, depth, scale in parts:
        module.eval()
        path = folder / f"{name}.ts"
        archive.save(
            torch.jit.trace(module, torch.randn(1, depth, 6 * scale, 5 * scale), check_trace=False),
            path,
        )
        calls = [
            (torch.randn(2, depth, 4 * scale, 7 * scale),),
            (torch.randn(1, depth, 9 * scale, 3 * scale),),
        ]
        check_calls(path.name, torch.jit.load(str(path)), module, calls, torch.float32)


def text_parts(source):
    """The tokenizer and the model; for SDXL both pairs, one after the other."""
    return [
        part for pair in zip(source.tokenizers, source.text_models, strict=True) for part in pair
    ]


@torch.no_grad()
def write_text_encoder(source, path, dtype):
    """text_encoder.ts, with weights in `dtype`. The command runs it in fp32 on the CPU."""
    for model in source.text_models:
        # Rounds the weights of the comparison, too.
        model.to(dtype).float()
    if len(source.text_models) == 1:
        encoder = text.make_text_encoder(*text_parts(source))
    else:
        encoder = text.make_text_and_size_encoder(*text_parts(source), vae.factor_of(source.vae))
    archive.save(encoder.to(dtype), path)
    # It shares the weights of the models.
    encoder.float()
    check_text_encoder(source, torch.jit.load(str(path)).float(), path.name)


def check_text_encoder(source, loaded, name):
    too_long = "many words " * text.tokens_of(*text_parts(source)[:2])
    inversions = {token for tokenizer in source.tokenizers for token in text.vectors(tokenizer)}
    # Four times: TorchScript optimizes after a few runs, and has mixed up lists then.
    for prompt in (*PROMPTS, *sorted(inversions)[:3], too_long) * 4:
        if len(source.text_models) == 1:
            got = [loaded.encode(prompt)]
            expected = [text.expected(prompt, *text_parts(source))]
        else:
            factor = vae.factor_of(source.vae)
            got = loaded.encode(prompt, 40, 24)
            expected = text.expected(prompt, *text_parts(source), size=(40 * factor, 24 * factor))
        for one, other in zip(got, expected, strict=True):
            check_equal(name, one, other, torch.float32)
        if prompt not in inversions and (loaded.cut(prompt) == "") == (prompt is too_long):
            raise Mistake(
                f"{name} must say what it leaves out of a prompt that is too long, and of no other."
            )
