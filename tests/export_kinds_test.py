"""Exports of many kinds of small random folders, each compared with what diffusers' from_pretrained
makes of the same folder: the UNet, the text encoder, the VAE, and a picture that the pipeline's own
loop draws.

One kind is one function with @kind, which writes the folder. Its title is a row of the table in
docs/models.md; `python export_kinds_test.py` prints that table, with what was measured.
"""

import contextlib
import dataclasses
import inspect
import io
import json
import os
import pathlib
import shutil
import sys
import tempfile
import unittest
from unittest import mock

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import torch
import transformers
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel

import make_tiny_pipeline
from sag_export import export
from sag_export.cli import parse

PROMPT, NEGATIVE = "a red cat and the <fox>", "on the red"
TABLE = make_tiny_pipeline.TABLE
diffusers.utils.logging.disable_progress_bar()


@dataclasses.dataclass
class Row:
    """How a folder is exported, and how it is read for the comparison."""

    # Of sag-export.
    arguments: tuple = ()
    # Of from_pretrained.
    options: dict = dataclasses.field(default_factory=dict)
    # Relative to the largest value.
    tolerance: float = 5e-5
    # Whether diffusers' pipeline can draw with this scheduler.
    draws: bool = True


KINDS = {}


def kind(title, fast=False):
    """Registers a function that writes the folder and returns its Row. `fast`: also in CI."""

    def register(make):
        KINDS[make.__name__] = (title, fast, make)
        return make

    return register


# What the folders are made of.


def unet_of(kind="sd1", **changes):
    """A small UNet2DConditionModel, with other values in its configuration."""
    config = make_tiny_pipeline.make_unet(kind).config
    given = {key: value for key, value in config.items() if not key.startswith("_")}
    torch.manual_seed(1)
    return UNet2DConditionModel(**{**given, **changes})


def vae_of(**changes):
    torch.manual_seed(2)
    values = {
        "block_out_channels": (8, 16),
        "norm_num_groups": 4,
        "layers_per_block": 1,
        "latent_channels": 4,
        "sample_size": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        **changes,
    }
    return AutoencoderKL(**values)


def text_of(tokenizer, kind=transformers.CLIPTextModel, **changes):
    torch.manual_seed(3)
    values = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 37,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "projection_dim": 32,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        **changes,
    }
    return kind(transformers.CLIPTextConfig(**values))


def tokenizer_of(padding="<|endoftext|>", added=(), length=77):
    """The one that pipelines use, CLIPTokenizer."""
    with tempfile.TemporaryDirectory() as folder:
        files = pathlib.Path(folder, "tokenizer")
        make_tiny_pipeline.write_tokenizer(files, padding)
        tokenizer = transformers.CLIPTokenizer.from_pretrained(files, model_max_length=length)
    tokenizer.add_tokens(list(added))
    return tokenizer


def sd(
    unet=None,
    vae=None,
    scheduler=None,
    tokenizer=None,
    text=None,
    kind=diffusers.StableDiffusionPipeline,
    **more,
):
    """A StableDiffusionPipeline, or another one that is made of the same parts."""
    tokenizer = tokenizer or tokenizer_of()
    parts = {
        "unet": unet or unet_of(),
        "vae": vae or vae_of(),
        "scheduler": scheduler or diffusers.DDIMScheduler(**TABLE),
        "tokenizer": tokenizer,
        "text_encoder": text or text_of(tokenizer),
        "safety_checker": None,
        "feature_extractor": None,
        **more,
    }
    return kind(**parts, requires_safety_checker=parts["safety_checker"] is not None)


def sdxl(unet=None, vae=None, scheduler=None, kind=diffusers.StableDiffusionXLPipeline):
    """A StableDiffusionXLPipeline, or another one that is made of the same parts."""
    first, second = tokenizer_of(), tokenizer_of("!")
    projecting = transformers.CLIPTextModelWithProjection
    return kind(
        unet=unet or unet_of("sdxl"),
        vae=vae or vae_of(scaling_factor=0.13025),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**TABLE),
        tokenizer=first,
        tokenizer_2=second,
        text_encoder=text_of(first),
        text_encoder_2=text_of(second, projecting, hidden_act="gelu"),
        add_watermarker=False,
    )


def save(pipeline, folder, **options):
    pipeline.save_pretrained(folder, **options)


def edit(path, **changes):
    """Other values in a JSON file; None takes a key away."""
    values = {**json.loads(path.read_text()), **changes}
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(json.dumps(kept))


def pixels(**changes):
    """A UNet without text."""
    torch.manual_seed(4)
    values = {
        "sample_size": 16,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        **changes,
    }
    return UNet2DModel(**values)


# Stable Diffusion 1.


@kind("Stable Diffusion 1: eps, PNDM")
def sd1(folder):
    save(sd(scheduler=diffusers.PNDMScheduler(**TABLE, skip_prk_steps=True)), folder)
    return Row()


@kind("with a safety checker")
def sd1_safety_checker(folder):
    config = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 1}
    vision = {**config, "num_attention_heads": 4, "image_size": 32, "patch_size": 16}
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

    checker = StableDiffusionSafetyChecker(
        transformers.CLIPConfig(vision_config=vision, projection_dim=32)
    )
    images = transformers.CLIPImageProcessor(crop_size=32, size=32)
    save(sd(safety_checker=checker, feature_extractor=images), folder)
    return Row()


@kind("all weights as `.bin`")
def sd1_bin(folder):
    save(sd(), folder, safe_serialization=False)
    return Row()


@kind("an `fp16` variant in shards, ONNX beside")
def sd1_fp16_shards(folder):
    save(sd().to(torch.float16), folder, variant="fp16", max_shard_size="60KB")
    (folder / "unet" / "model.onnx").touch()
    return Row(options={"variant": "fp16"})


@kind("several variants, `ema` chosen")
def sd1_variants(folder):
    for variant, seed in (("non_ema", 5), ("ema", 6)):
        pipeline = sd()
        torch.manual_seed(seed)
        pipeline.unet.conv_in.reset_parameters()
        save(pipeline, folder, variant=variant)
    return Row(("--variant", "ema"), {"variant": "ema"})


@kind("weights in bf16, as shards of `.bin`")
def sd1_bf16(folder):
    save(sd().to(torch.bfloat16), folder, safe_serialization=False, max_shard_size="60KB")
    return Row(options={"use_safetensors": False})


@kind("a snapshot of the Hub's cache", fast=True)
def sd1_snapshot(folder):
    whole = folder.with_name(folder.name + "-blobs")
    save(sd(), whole)
    for i, file in enumerate(sorted(path for path in whole.rglob("*") if path.is_file())):
        link = folder / file.relative_to(whole)
        link.parent.mkdir(parents=True, exist_ok=True)
        file = file.rename(whole / f"{i:040x}")
        link.symlink_to(os.path.relpath(file, link.parent))
    return Row()


@kind("as the first diffusers wrote it: old names of attention, few keys")
def sd1_old(folder):
    pipeline = sd(vae=vae_of(scaling_factor=0.18215))
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = pipeline.vae.state_dict()
    for new, name in old.items():
        state = {
            key.replace(f"attentions.0.{new}.", f"attentions.0.{name}."): value
            for key, value in state.items()
        }
    with mock.patch.object(pipeline.vae, "state_dict", lambda: state):
        save(pipeline, folder, safe_serialization=False)
    edit(
        folder / "vae" / "config.json", scaling_factor=None, force_upcast=None, use_quant_conv=None
    )
    new = (
        "addition_embed_type",
        "upcast_attention",
        "use_linear_projection",
        "resnet_time_scale_shift",
    )
    edit(folder / "unet" / "config.json", _diffusers_version="0.2.2", **dict.fromkeys(new))
    scheduler = folder / "scheduler" / "scheduler_config.json"
    edit(scheduler, prediction_type=None, rescale_betas_zero_snr=None, timestep_spacing=None)
    position_ids = torch.arange(77)[None]
    file = folder / "text_encoder" / "pytorch_model.bin"
    weights = torch.load(file, weights_only=True)
    torch.save({**weights, "text_model.embeddings.position_ids": position_ids}, file)
    return Row()


@kind("saved from `torch.compile` (`_orig_mod.`)")
def sd1_compiled(folder):
    save(sd(), folder)
    from safetensors.torch import load_file, save_file

    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    # diffusers does not read such a file: it is compared with the plain one.
    shutil.copytree(folder, folder.with_name(folder.name + "-plain"))
    save_file({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, file)
    return Row()


@kind("a tokenizer with added tokens")
def sd1_added_tokens(folder):
    save(sd(tokenizer=tokenizer_of(added=("<fox>", "<hat>"))), folder)
    return Row()


@kind("a textual inversion of three vectors")
def sd1_inversion(folder):
    pipeline = sd()
    # Of the size that the small model's own vectors have.
    pipeline.load_textual_inversion({"<fox>": torch.randn(3, 32) * 0.02}, token="<fox>")
    save(pipeline, folder)
    return Row()


@kind("a text encoder of 248 tokens (Long CLIP)")
def sd1_long_clip(folder):
    tokenizer = tokenizer_of(length=248)
    text = text_of(tokenizer, max_position_embeddings=248)
    save(sd(tokenizer=tokenizer, text=text), folder)
    return Row()


@kind("exported with `--dtype bf16`")
def sd1_half(folder):
    save(sd(), folder)
    return Row(("--dtype", "bf16"), {"torch_dtype": torch.bfloat16}, tolerance=4e-2, draws=False)


@kind("distilled, without a middle block (BK-SDM)")
def sd1_distilled(folder):
    unet = unet_of(mid_block_type=None)
    save(sd(unet=unet), folder)
    return Row(("--site", "#0"))


@kind("three levels of another depth, heads and width for each")
def sd1_depths(folder):
    unet = unet_of(
        block_out_channels=(16, 24, 32),
        layers_per_block=(1, 2, 1),
        attention_head_dim=(2, 3, 4),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        sample_size=(12, 20),
    )
    save(sd(unet=unet), folder)
    return Row()


@kind("blocks that time scales and shifts (`scale_shift`), gelu")
def sd1_scale_shift(folder):
    unet = unet_of(
        resnet_time_scale_shift="scale_shift", act_fn="gelu", time_embedding_act_fn="silu"
    )
    save(sd(unet=unet), folder)
    return Row()


# VAEs.


@kind("a VAE of 16 channels with a shift, without quant convolutions")
def vae_sixteen_channels(folder):
    vae = vae_of(
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    save(sd(unet=unet_of(in_channels=16, out_channels=16), vae=vae), folder)
    # The pipeline of Stable Diffusion 1 leaves the shift out.
    return Row(draws=False)


@kind("a VAE of three levels without attention in the middle")
def vae_without_attention(folder):
    vae = vae_of(
        block_out_channels=(8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        mid_block_add_attention=False,
    )
    save(sd(vae=vae), folder)
    return Row()


# Stable Diffusion 2.


@kind("Stable Diffusion 2: v, zero terminal SNR, OpenCLIP's text encoder", fast=True)
def sd2(folder):
    scheduler = diffusers.DDIMScheduler(
        **TABLE,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    tokenizer = tokenizer_of("!")
    text = text_of(tokenizer, hidden_act="gelu", num_hidden_layers=2)
    save(sd(unet=unet_of("sd2"), scheduler=scheduler, tokenizer=tokenizer, text=text), folder)
    return Row()


@kind("Stable Diffusion 2: eps, attention in fp32 (`upcast_attention`)")
def sd2_upcast(folder):
    unet = unet_of("sd2", upcast_attention=True)
    save(sd(unet=unet, scheduler=diffusers.EulerDiscreteScheduler(**TABLE)), folder)
    return Row()


# SDXL.


@kind("SDXL: two text encoders, sizes", fast=True)
def sdxl_base(folder):
    save(sdxl(), folder)
    return Row()


@kind("SDXL: an `fp16` variant in shards beside plain weights")
def sdxl_fp16(folder):
    save(sdxl(), folder)
    save(sdxl().to(torch.float16), folder, variant="fp16", max_shard_size="60KB")
    return Row(("--variant", "fp16"), {"variant": "fp16"})


@kind("SDXL of another depth (as SSD-1B), v, zero terminal SNR")
def sdxl_depths(folder):
    unet = unet_of(
        "sdxl",
        block_out_channels=(16, 24, 32),
        attention_head_dim=(2, 3, 4),
        transformer_layers_per_block=(1, 2, 3),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **TABLE,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    )
    save(sdxl(unet=unet, scheduler=scheduler), folder)
    return Row(("--site", "middle.0.0"))


@kind("SDXL with an EDM scheduler, latents with mean and deviation")
def sdxl_edm(folder):
    vae = vae_of(
        scaling_factor=0.5, latents_mean=[-1.6, 1.1, 0.3, -0.2], latents_std=[8.4, 5.9, 3.1, 4.2]
    )
    save(sdxl(vae=vae, scheduler=diffusers.EDMDPMSolverMultistepScheduler()), folder)
    return Row()


@kind("SDXL: a textual inversion of three vectors in both text encoders", fast=True)
def sdxl_inversion(folder):
    pipeline = sdxl()
    for end in ("", "_2"):
        parts = {name: getattr(pipeline, name + end) for name in ("tokenizer", "text_encoder")}
        vectors = {"<fox>": torch.randn(3, 32) * 0.02}
        pipeline.load_textual_inversion(vectors, token="<fox>", **parts)
    save(pipeline, folder)
    return Row()


# UNets that take more than a latent and text.


@kind("inpainting: 9 channels", fast=True)
def inpaint(folder):
    save(sd(unet=unet_of("inpaint"), kind=diffusers.StableDiffusionInpaintPipeline), folder)
    return Row()


@kind("SDXL, inpainting: 9 channels")
def sdxl_inpaint(folder):
    unet = unet_of("sdxl", in_channels=9)
    save(sdxl(unet=unet, kind=diffusers.StableDiffusionXLInpaintPipeline), folder)
    return Row()


@kind("instruct-pix2pix: 8 channels")
def instruct_pix2pix(folder):
    pipeline = diffusers.StableDiffusionInstructPix2PixPipeline
    save(sd(unet=unet_of("edit"), kind=pipeline), folder)
    return Row()


@kind("a latent consistency model: an embedded scale of guidance", fast=True)
def lcm(folder):
    pipeline = diffusers.LatentConsistencyModelPipeline
    save(sd(unet=unet_of("lcm"), scheduler=diffusers.LCMScheduler(**TABLE), kind=pipeline), folder)
    return Row()


# Flow matching, and UNets without a pipeline or without text.


@kind("a flow-matching scheduler")
def flow(folder):
    save(sd(), folder)
    shutil.rmtree(folder / "scheduler")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    scheduler = ["diffusers", "FlowMatchEulerDiscreteScheduler"]
    edit(folder / "model_index.json", scheduler=scheduler)
    return Row(draws=False)


@kind("the folder of a UNet with text", fast=True)
def unet_alone(folder):
    unet_of("sd2").save_pretrained(folder, variant="ema")
    return Row(("--prediction", "v"), {"variant": "ema"})


@kind("a UNet without text, a DDPM pipeline of pixels", fast=True)
def ddpm(folder):
    save(diffusers.DDPMPipeline(pixels(), diffusers.DDPMScheduler()), folder)
    return Row()


@kind("a UNet without text, of latents, three levels, old names of attention")
def ldm_unet(folder):
    unet = pixels(
        in_channels=4,
        out_channels=4,
        block_out_channels=(16, 24, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = unet.state_dict()
    for new, name in old.items():
        state = {key.replace(f".{new}.", f".{name}."): value for key, value in state.items()}
    with mock.patch.object(unet, "state_dict", lambda: state):
        unet.save_pretrained(folder, safe_serialization=False)
    return Row(("--prediction", "eps"))


@kind("a UNet without text, Fourier features of the noise level")
def score_sde(folder):
    unet = pixels(
        time_embedding_type="fourier",
        downsample_type="resnet",
        upsample_type="resnet",
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    )
    unet.save_pretrained(folder)
    return Row(("--prediction", "edm"))


@kind("a UNet without text, with classes", fast=True)
def classes(folder):
    pixels(num_class_embeds=10).save_pretrained(folder)
    return Row(("--prediction", "eps"))


# The comparison.


def file_inputs(
    x,
    timesteps,
    encoder_hidden_states=None,
    added_cond_kwargs=None,
    class_labels=None,
    timestep_cond=None,
):
    """What the written file takes, out of what diffusers' UNets take."""
    y = added_cond_kwargs and torch.cat(
        [added_cond_kwargs["text_embeds"], added_cond_kwargs["time_ids"]], 1
    )
    further = (encoder_hidden_states, y, class_labels, timestep_cond)
    return [x, timesteps, *(tensor for tensor in further if tensor is not None)]


class Comparison:
    """One exported folder, and the largest difference of each part, relative to its values."""

    def __init__(self, name, folder):
        self.title, _, make = KINDS[name]
        self.folder, self.out = folder / name, folder / f"{name}-out"
        torch.manual_seed(0)
        self.row = make(self.folder)
        with contextlib.redirect_stderr(io.StringIO()):
            arguments = [str(self.folder), "--out", str(self.out), *self.row.arguments]
            export.export_model(parse(arguments))
        self.model = json.loads((self.out / "model.json").read_text())
        plain = folder / f"{name}-plain"
        self.read_reference(plain if plain.exists() else self.folder)
        self.found = {}

    def read_reference(self, folder):
        """The pipeline, or the UNet alone, as diffusers reads it."""
        self.pipeline, self.reference = None, folder
        if (folder / "model_index.json").exists():
            index = json.loads((folder / "model_index.json").read_text())
            kind = getattr(diffusers, index["_class_name"])
            self.pipeline = kind.from_pretrained(folder, **self.row.options)
            self.unet = self.pipeline.unet
        else:
            config = json.loads((folder / "config.json").read_text())
            kind = getattr(diffusers, config["_class_name"])
            self.unet = kind.from_pretrained(folder, **self.row.options)
        self.unet.eval()

    def file(self, name):
        return torch.jit.load(str(self.out / self.model["files"][name]))

    def compare(self, part, got, expected):
        assert got.shape == expected.shape, (part, got.shape, expected.shape)
        assert expected.float().std() > 0, f"{part} is constant, which shows nothing"
        largest = expected.float().abs().max()
        difference = ((got.float() - expected.float()).abs().max() / largest).item()
        self.found[part] = max(self.found.get(part, 0.0), difference)

    @torch.no_grad()
    def run(self):
        self.compare_unet()
        if "text_encoder" in self.model["files"]:
            self.compare_texts()
        if "decoder" in self.model["files"]:
            self.compare_vae()
        if self.pipeline is not None and self.row.draws:
            self.compare_pictures()
        return self.found

    def further_inputs(self, rows, dtype):
        """Random ones of all that the UNet takes beside x and timesteps, by diffusers' names."""
        config, given = self.unet.config, {}
        if not isinstance(self.unet, UNet2DModel):
            text = torch.randn(rows, 77, config.cross_attention_dim)
            given["encoder_hidden_states"] = text.to(dtype)
        if config.get("addition_embed_type"):
            sizes = torch.tensor([[96.0, 64, 8, 0, 96, 64]]).expand(rows, -1)
            added = {"text_embeds": torch.randn(rows, 32), "time_ids": sizes}
            given["added_cond_kwargs"] = {key: value.to(dtype) for key, value in added.items()}
        if config.num_class_embeds:
            given["class_labels"] = torch.randint(config.num_class_embeds, (rows,))
        if config.get("time_cond_proj_dim"):
            given["timestep_cond"] = torch.randn(rows, config.time_cond_proj_dim).to(dtype)
        return given

    def compare_unet(self):
        traced = self.file("unet")
        dtype = next(self.unet.parameters()).dtype
        step = self.model["sample"]["multiple"]
        for rows, height, width in ((1, 4 * step, 6 * step), (3, 10 * step, 5 * step)):
            x = torch.randn(rows, self.unet.config.in_channels, height, width).to(dtype)
            timesteps = torch.linspace(3.0, 970.0, rows + 1)[1:]
            given = self.further_inputs(rows, dtype)
            expected = self.unet(x, timesteps, **given).sample
            self.compare("unet", traced(*file_inputs(x, timesteps, **given)), expected)

    def encode(self, encoder, prompt, height, width):
        """[context] or [context, y] out of the written file."""
        if hasattr(self.pipeline, "text_encoder_2"):
            return list(encoder.encode(prompt, height, width))
        return [encoder.encode(prompt)]

    def size_numbers(self, size):
        """What SDXL's pipelines append to the pooled text, for a picture of this size."""
        given = [size, (0, 0), size]
        inpainting = isinstance(self.pipeline, diffusers.StableDiffusionXLInpaintPipeline)
        if inpainting:
            # Two scores that only a refiner takes, and the same for the negative prompt.
            given += [6.0, 2.5, *given]
        width = self.pipeline.text_encoder_2.config.projection_dim
        numbers = self.pipeline._get_add_time_ids(*given, torch.float32, width)
        return numbers[0] if inpainting else numbers

    def compare_texts(self):
        encoder = self.file("text_encoder").float()
        height, width = 6, 10
        for prompt in (PROMPT, NEGATIVE, "", "the cat's in " * 90):
            got = self.encode(encoder, prompt, height, width)
            if len(got) == 2:
                context, _, pooled, _ = self.pipeline.encode_prompt(
                    prompt, device="cpu", do_classifier_free_guidance=False
                )
                factor = self.pipeline.vae_scale_factor
                size = (height * factor, width * factor)
                self.compare("text", got[1], torch.cat([pooled, self.size_numbers(size)], 1))
            elif hasattr(self.pipeline, "encode_prompt"):
                context = self.pipeline.encode_prompt(prompt, "cpu", 1, False)[0]
            else:
                # instruct-pix2pix's.
                context = self.pipeline._encode_prompt(prompt, "cpu", 1, False)
            self.compare("text", got[0], context)

    def latent_scale(self, vae):
        """(mean, factor): the UNet's latents are (the VAE's − mean) · factor."""
        config = vae.config
        if config.latents_mean is not None:
            mean, std = (
                torch.tensor(values).reshape(1, -1, 1, 1)
                for values in (config.latents_mean, config.latents_std)
            )
            return mean, config.scaling_factor / std
        return config.shift_factor or 0.0, config.scaling_factor

    def compare_vae(self):
        # Always in fp32.
        options = {key: self.row.options[key] for key in self.row.options if key != "torch_dtype"}
        vae = AutoencoderKL.from_pretrained(self.reference / "vae", **options).eval()
        mean, factor = self.latent_scale(vae)
        decoder, encoder = self.file("decoder"), self.file("encoder")
        pixels = 2 ** (len(vae.config.block_out_channels) - 1)
        for rows, height, width in ((2, 5, 7), (1, 9, 4)):
            latent = torch.randn(rows, vae.config.latent_channels, height, width)
            picture = torch.rand(rows, 3, height * pixels, width * pixels) * 2 - 1
            expected = vae.decode(latent / factor + mean).sample
            self.compare("vae", decoder(latent), expected)
            expected = (vae.encode(picture).latent_dist.mode() - mean) * factor
            self.compare("vae", encoder(picture), expected)

    def call(self, **given):
        """The pipeline's own loop, with the same noise every time. What its kind of pipeline does
        not take (a negative prompt, a size) is left out."""
        torch.manual_seed(7)
        taken = inspect.signature(self.pipeline.__call__).parameters
        given = {name: value for name, value in given.items() if name in taken}
        return self.pipeline(**given, num_inference_steps=3).images

    def draw(self, texts, start, output):
        """With text: prompts, or what they were encoded to. start: the noise, and what else the
        loop begins with."""
        factor = self.pipeline.vae_scale_factor
        height, width = (side * factor for side in start["latents"].shape[2:])
        given = {"height": height, "width": width, "guidance_scale": 4.0}
        for name, text in zip(("prompt", "negative_prompt"), texts, strict=True):
            if isinstance(text, str):
                given[name] = text
            else:
                given[f"{name}_embeds"] = text[0]
            if len(text) == 2:
                pooled = text[1][:, :-6]
                given[name.replace("prompt", "pooled_prompt_embeds")] = pooled
        return self.call(output_type=output, **start, **given)

    def starts(self):
        """Two of `draw`, which mean the same: one for the pipeline's VAE, and one with what the
        written encoder makes of the picture."""
        channels, *size = self.model["sample"]["shape"]
        noise = {"latents": torch.randn(1, channels, *size)}
        concat = self.model.get("inputs", {}).get("concat")
        if concat is None:
            return noise, noise
        sides = [side * self.pipeline.vae_scale_factor for side in size]
        image, vae, encoder = torch.rand(1, 3, *sides), self.pipeline.vae, self.file("encoder")
        pixels = image * 2 - 1
        if concat["kind"] == "edit":
            latent = encoder(pixels) * concat["scale"]
            return {**noise, "image": image}, {**noise, "image": latent}
        mask = torch.zeros(1, 1, *sides)
        mask[:, :, 5:17, 8:27] = 1
        given = {**noise, "image": image, "mask_image": mask, "strength": 1.0}
        pixels = pixels * (1 - mask)
        # The pipeline draws from the encoder's posterior; its mean is what can be compared.
        expected = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
        return tuple(
            {**given, "masked_image_latents": latent} for latent in (expected, encoder(pixels))
        )

    def compare_pictures(self):
        """With the written files in the place of the pipeline's networks."""
        self.pipeline.set_progress_bar_config(disable=True)
        if hasattr(self.pipeline, "safety_checker"):
            self.pipeline.safety_checker = None
        traced = self.file("unet")

        def forward(x, t, return_dict=True, cross_attention_kwargs=None, **given):
            rows = torch.as_tensor(t, dtype=torch.float32).expand(x.shape[0])
            out = traced(*file_inputs(x, rows, **given))
            return mock.Mock(sample=out) if return_dict else (out,)

        if "text_encoder" not in self.model["files"]:
            expected = torch.as_tensor(self.call(output_type="np"))
            with mock.patch.object(self.unet, "forward", forward):
                got = torch.as_tensor(self.call(output_type="np"))
            self.compare("picture", got, expected)
            return
        start, start_of_files = self.starts()
        expected = self.draw((PROMPT, NEGATIVE), start, "pt")
        encoder = self.file("text_encoder").float()
        size = self.model["sample"]["shape"][1:]
        texts = [self.encode(encoder, text, *size) for text in (PROMPT, NEGATIVE)]
        with mock.patch.object(self.unet, "forward", forward):
            latent = self.draw(texts, start_of_files, "latent")
        picture = self.file("decoder")(latent)
        self.compare("picture", (picture / 2 + 0.5).clamp(0, 1), expected)


class Case(unittest.TestCase):
    def check(self, name):
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(name, pathlib.Path(folder))
            found = comparison.run()
        self.assertIn("unet", found)
        for part, difference in found.items():
            # "not <=": NaN is a difference, too.
            self.assertTrue(difference <= comparison.row.tolerance, f"{part}: {difference:.2g}")


class Fast(Case):
    """A few of every family."""

    def test_the_table_in_the_document_has_every_kind(self):
        document = (pathlib.Path(__file__).parent.parent / "docs" / "models.md").read_text()
        for title, _, _ in KINDS.values():
            self.assertIn(f"| {title} |", document)


class Rest(Case):
    """All others, which take minutes."""


for name, (_, fast, _) in KINDS.items():
    setattr(Fast if fast else Rest, f"test_{name}", lambda self, name=name: self.check(name))


def cell(difference):
    if difference is None:
        return "–"
    return f"{difference:.0e}".replace("e-0", "e-") if difference else "equal"


def print_table(names):
    print("| kind | UNet | text | VAE | picture |\n|---|---|---|---|---|")
    for name in names or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            comparison = Comparison(name, pathlib.Path(folder))
            found = comparison.run()
        cells = (cell(found.get(part)) for part in ("unet", "text", "vae", "picture"))
        print(f"| {comparison.title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    print_table(sys.argv[1:])
