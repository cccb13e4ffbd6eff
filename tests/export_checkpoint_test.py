"""Checkpoints in one file: a skeleton that is filled from one gives what the pipeline's own parts
give, in Python and with the command."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import subprocess
import unittest

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizerFast

import export_model_test
import make_golden_skeletons
from export_ldm_names_test import as_file
from export_skeleton_test import names_of
from sag_export import compiled_skeleton, ldm_names, skeleton, text, vae
from sag_export.sites import Marks

SAMPLE = os.environ.get("SAG_SAMPLE_COMMAND")
GOLDEN = pathlib.Path(__file__).resolve().parent / "golden"
TEXT_CONFIG = (
    "bos_token_id",
    "eos_token_id",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "projection_dim",
    "vocab_size",
)
# What each kind of tiny pipeline is to checkpoints: its family, and the markers of its file.
FAMILY = {"inpaint": "sd1", "edit": "sd1"}
MARKERS = {"sd2": ("v_pred", "ztsnr")}
# Beside the networks, as files of each family have it.
EXTRA = {
    "sd1": {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": (1, 77),
        "model_ema.diffusion_modelinput_blocks00weight": (3,),
        "first_stage_model.loss.discriminator.main.0.weight": (2, 2),
        "alphas_cumprod": (1000,),
    },
    "sd2": {
        "cond_stage_model.model.transformer.resblocks.3.ln_1.weight": (32,),
        "cond_stage_model.model.text_projection": (32, 32),
        "cond_stage_model.model.logit_scale": (),
    },
    "sdxl": {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": (1, 77),
        "conditioner.embedders.1.model.logit_scale": (),
        "denoiser.sigmas": (1000,),
    },
}


def tokenizers_of(folder):
    return [
        CLIPTokenizerFast.from_pretrained(part)
        for part in sorted(folder.glob("tokenizer*"))
        if part.is_dir()
    ]


def text_models_of(folder):
    kinds = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}
    return [
        kind.from_pretrained(folder / part, attn_implementation="eager").eval()
        for part, kind in kinds.items()
        if (folder / part).is_dir()
    ]


def family_of(kind, folder):
    """Of a tiny pipeline."""

    def config(part):
        content = json.loads((folder / part / "config.json").read_text())
        return {key: value for key, value in content.items() if not key.startswith("_")}

    shipped = skeleton.FAMILIES[kind]
    texts = []
    for model, part in zip(shipped.text, ("text_encoder", "text_encoder_2"), strict=False):
        own = {key: value for key, value in config(part).items() if key in TEXT_CONFIG}
        texts.append(dataclasses.replace(model, config=own))
    return skeleton.Family(f"tiny-{kind}", config("unet"), config("vae"), tuple(texts))


def is_convolution_in_files(key):
    parts = key.split(".")
    return "attn_1" in parts and parts[-2] in ("q", "k", "v", "proj_out") and parts[-1] == "weight"


def checkpoint_of(family, folder):
    """The tensors of a pipeline as a checkpoint of its family holds them."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    autoencoder = AutoencoderKL.from_pretrained(folder / "vae")
    parts = [(unet, ldm_names.unet_names(unet)), (autoencoder, ldm_names.vae_names(autoencoder))]
    for model, module in zip(family.text, text_models_of(folder), strict=True):
        parts.append((module, skeleton.text_names(model, module)))
    file = {}
    for module, names in parts:
        file |= as_file(module, names)
    for key in filter(is_convolution_in_files, file):
        file[key] = file[key][..., None, None]
    return file


def stored(entry, file):
    """A parameter's value, as the library finds it in C++."""
    value = file[entry["key"]].float()
    value = value.T if entry.get("transposed") else value
    value = value[slice(*entry["rows"])] if "rows" in entry else value
    shape = [
        value.shape[i] if i in entry.get("free", ()) else n for i, n in enumerate(entry["shape"])
    ]
    return value.reshape(shape).clone()


@torch.no_grad()
def filled(path, file):
    module = torch.jit.load(str(path))
    entries = names_of(path)["parameters"]
    for name, parameter in module.named_parameters():
        parameter.set_(stored(entries[name], file))
    return module


class Case(export_model_test.Case):
    def pipeline(self, kind):
        """Its weights are numbers of half precision, so files in both dtypes hold the same."""
        folder = self.folder / f"pipeline-{kind}"
        if not folder.exists():
            super().pipeline(kind)
            for path in folder.glob("*/*.safetensors"):
                tensors = {k: t.half().float() for k, t in load_file(path).items()}
                save_file(tensors, path, {"format": "pt"})
        return folder

    def skeleton(self, kind):
        """Its family and its folder."""
        kind = FAMILY.get(kind, kind)
        family = family_of(kind, self.pipeline(kind))
        folder = self.folder / family.name
        if not folder.exists():
            folder.mkdir()
            with contextlib.redirect_stderr(io.StringIO()):
                skeleton.write(family, folder, tokenizers_of(self.pipeline(kind)))
        return family, folder

    def tensors(self, kind):
        return checkpoint_of(self.skeleton(kind)[0], self.pipeline(kind))

    def compare(self, got, expected, tolerance=1e-5):
        self.assertEqual(got.shape, expected.shape)
        self.assertLessEqual((got - expected).abs().max(), tolerance * expected.abs().max())


class Networks(Case):
    """Skeletons that are filled in Python."""

    KINDS = ("sd1", "sd2", "sdxl", "inpaint", "edit")

    @torch.no_grad()
    def check_unet(self, kind, folder, file):
        module = filled(folder / "unet.ts", file)
        unet = UNet2DConditionModel.from_pretrained(self.pipeline(kind) / "unet").eval()
        network = skeleton.unet.wrap(unet)
        for rows, size in ((1, (9, 7)), (3, (16, 24))):
            inputs = network.example(rows, *size, seed=1).values()
            self.compare(module(*inputs), network.module(*inputs))

    @torch.no_grad()
    def check_vae(self, kind, folder, file):
        autoencoder = AutoencoderKL.from_pretrained(self.pipeline(kind) / "vae").eval()
        torch.manual_seed(0)
        latent, picture = torch.randn(2, 4, 5, 7), torch.randn(2, 3, 40, 56)
        for name, module, given in (
            ("decoder", vae.Decoder(autoencoder), latent),
            ("encoder", vae.Encoder(autoencoder), picture),
        ):
            self.compare(filled(folder / f"{name}.ts", file)(given), module(given))

    @torch.no_grad()
    def check_text(self, kind, folder, file):
        encoder = filled(folder / "text_encoder.ts", file)
        pipeline = self.pipeline(kind)
        pairs = zip(tokenizers_of(pipeline), text_models_of(pipeline), strict=True)
        parts = [part for pair in pairs for part in pair]
        for prompt in ("", "the red cat", "many words " * 40):
            if len(parts) == 2:
                self.compare(encoder.encode(prompt), text.expected(prompt, *parts))
                continue
            expected = text.expected(prompt, *parts, size=(5 * 8, 7 * 8))
            for got, one in zip(encoder.encode(prompt, 5, 7), expected, strict=True):
                self.compare(got, one)

    def test_they_are_the_pipelines(self):
        for kind in self.KINDS:
            with self.subTest(kind):
                _, folder = self.skeleton(kind)
                file = self.tensors(kind)
                self.check_unet(kind, folder, file)
                self.check_vae(kind, folder, file)
                self.check_text(kind, folder, file)

    def test_every_tensor_is_used(self):
        for kind in self.KINDS:
            _, folder = self.skeleton(kind)
            used = {
                entry["key"]
                for path in folder.glob("*.ts")
                for entry in names_of(path)["parameters"].values()
            }
            self.assertEqual(used, set(self.tensors(kind)))


class Golden(Case):
    """ComfyUI's own UNets, whose state has LDM's names, in skeletons of diffusers' modules."""

    @torch.no_grad()
    def test_they_give_what_comfyui_gives(self):
        calls = torch.load(GOLDEN / "unet_io.pt", weights_only=True)
        for name in make_golden_skeletons.FAMILIES:
            golden = torch.jit.load(str(GOLDEN / f"{name}.ts"))
            file = make_golden_skeletons.checkpoint(golden)
            module = filled(GOLDEN / "skeletons" / name / "unet.ts", file)
            for call in "ab":
                given = {
                    key.removeprefix(f"{name}.{call}."): value
                    for key, value in calls.items()
                    if key.startswith(f"{name}.{call}.")
                }
                inputs = [given[key] for key in ("x", "timesteps", "context", "y") if key in given]
                self.compare(module(*inputs), given["out"])


class Command(Case):
    """With a checkpoint and a skeleton, against the directory that sag-export writes."""

    def sample(self, *arguments, code=0):
        command = [SAMPLE, *map(str, arguments), "--device", "cpu", "--threads", "1"]
        run = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(run.returncode, code, run.stderr)
        return run.stdout if code == 0 else run.stderr

    def checkpoint(self, kind, dtype=torch.float32, markers=(), **changes):
        """A file; `changes`: tensors by name, None leaves one out."""
        file = {key: value.to(dtype) for key, value in self.tensors(kind).items()}
        torch.manual_seed(1)
        for key, shape in EXTRA[FAMILY.get(kind, kind)].items():
            file[key] = torch.randn(shape)
        file |= {marker: torch.tensor([]) for marker in markers} | changes
        path = self.folder / "checkpoint.safetensors"
        save_file(
            {key: value.contiguous() for key, value in file.items() if value is not None}, path
        )
        return path

    def drawn(self, *arguments):
        """The latent and the bytes of the picture."""
        latent, picture = self.folder / "drawn.pt", self.folder / "drawn.png"
        run = ("--prompt", "the red cat", "--negative", "a (dog:1.3)", "--steps", "3")
        run += ("--cfg", "5", "--sag-scale", "0.75", "--seed", "3", "--quiet")
        self.sample(*arguments, *run, "--save-latent", latent, "--out", picture)
        return torch.load(latent, weights_only=True), picture.read_bytes()

    def check_draws_the_same(self, kind, model, *given, markers=()):
        expected = self.drawn("--model", model, *given)
        _, folder = self.skeleton(kind)
        for dtype in (torch.float32, torch.float16):
            with self.subTest(kind, dtype=dtype, markers=markers):
                file = self.checkpoint(kind, dtype, markers)
                latent, picture = self.drawn("--checkpoint", file, "--skeleton", folder, *given)
                self.compare(latent, expected[0])
                self.assertEqual(picture, expected[1])

    def test_every_family(self):
        for kind in ("sd1", "sd2", "sdxl"):
            model, _ = self.export(self.pipeline(kind), f"exported-{kind}")
            self.check_draws_the_same(kind, model, markers=MARKERS.get(kind, ()))

    def test_without_markers_it_predicts_what_the_skeleton_says(self):
        model, _ = self.export(
            *(self.pipeline("sd2"), "eps", "--prediction", "eps"),
            *("--constant", "zero_terminal_snr=false"),
        )
        self.check_draws_the_same("sd2", model)

    def test_unets_with_more_channels(self):
        photo, mask = self.folder / "photo.png", self.folder / "mask.png"
        export_model_test.png(photo, 136, 72)
        export_model_test.png(mask, 136, 72)
        for kind, given in (
            ("inpaint", ("--image", photo, "--mask", mask)),
            ("edit", ("--image", photo, "--image-cfg", "1.5")),
        ):
            model, _ = self.export(self.pipeline(kind), f"exported-{kind}")
            self.check_draws_the_same(kind, model, *given)

    def test_other_spellings(self):
        """NovelAI's, sgm's, and diffusers' script of old."""
        attention = "first_stage_model.decoder.mid.attn_1."
        changes = {
            "sd1": ("cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."),
            "sd2": ("cond_stage_model.model.", "conditioner.embedders.0.model."),
            "sdxl": (f"{attention}proj_out.", f"{attention}to_out.0."),
        }
        for kind, (usual, other) in changes.items():
            with self.subTest(kind):
                _, folder = self.skeleton(kind)
                given = ("--skeleton", folder, "--checkpoint")
                latent, picture = self.drawn(*given, self.checkpoint(kind))
                file = load_file(self.checkpoint(kind))
                renamed = {}
                for key, value in file.items():
                    begins = key.startswith(usual)
                    renamed[other + key.removeprefix(usual) if begins else key] = value
                self.assertNotEqual(set(renamed), set(file))
                path = self.folder / "renamed.safetensors"
                save_file(renamed, path)
                got = self.drawn(*given, path)
                self.compare(got[0], latent)
                self.assertEqual(got[1], picture)

    def test_a_vae_from_another_file(self):
        """With LDM's names or diffusers', old and new; the checkpoint's own is not looked at."""
        _, folder = self.skeleton("sd1")
        given = ("--skeleton", folder, "--checkpoint")
        _, expected = self.drawn(*given, self.checkpoint("sd1"))
        tensors = self.tensors("sd1")
        vae_keys = [key for key in tensors if key.startswith("first_stage_model.")]
        bare = {key.removeprefix("first_stage_model."): tensors[key] for key in vae_keys}
        new = load_file(self.pipeline("sd1") / "vae" / "diffusion_pytorch_model.safetensors")
        names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
        old = {}
        for key, value in new.items():
            for now, before in names.items():
                key = key.replace(f".{now}.", f".{before}.")
            old[key] = value
        self.assertNotEqual(set(old), set(new))
        # Nothing of its own is left.
        own = self.checkpoint("sd1", **dict.fromkeys(vae_keys))
        file = self.folder / "vae.safetensors"
        for kind, vae_file in (("ldm", bare), ("diffusers", new), ("old diffusers", old)):
            with self.subTest(kind):
                save_file({key: value.contiguous() for key, value in vae_file.items()}, file)
                self.assertEqual(self.drawn(*given, own, "--vae", file)[1], expected)

    def test_a_projection_as_transformers_stores_it(self):
        _, folder = self.skeleton("sdxl")
        given = ("--skeleton", folder, "--checkpoint")
        expected, _ = self.drawn(*given, self.checkpoint("sdxl"))
        key = "conditioner.embedders.1.model.text_projection"
        changes = {key: None, f"{key}.weight": self.tensors("sdxl")[key].T}
        self.compare(self.drawn(*given, self.checkpoint("sdxl", **changes))[0], expected)

    def test_loras_are_merged(self):
        """Into a checkpoint whose weights were changed in Python."""
        unet = "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
        layer = "lora_te_text_model_encoder_layers_0_self_attn_k_proj"
        query = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
        convolution = "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
        resblock = "cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight"
        text_layer = "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn"
        for kind, text_key in (("sd1", f"{text_layer}.k_proj.weight"), ("sd2", resblock)):
            with self.subTest(kind):
                _, folder = self.skeleton(kind)
                given = ("--skeleton", folder, "--checkpoint")
                plain = self.tensors(kind)
                width = plain[text_key].shape[1]
                changed, lora = {}, {}
                for name, key, rows in (
                    (f"lora_unet_{unet}", query, slice(None)),
                    ("lora_unet_down_blocks_0_resnets_0_conv1", convolution, slice(None)),
                    (layer, text_key, slice(None) if kind == "sd1" else slice(width, 2 * width)),
                ):
                    weight = plain[key].clone()
                    part = weight[rows]
                    kernel = part.shape[2:]
                    down = torch.randn(2, part.shape[1], *kernel)
                    up = torch.randn(part.shape[0], 2, *[1 for _ in kernel])
                    lora |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
                    lora[f"{name}.alpha"] = torch.tensor(1.0)
                    change = (up.flatten(1) @ down.flatten(1)).reshape(part.shape)
                    weight[rows] = part + 0.3 * (1.0 / 2) * change
                    changed[key] = weight
                file = self.folder / "style.safetensors"
                save_file(lora, file)
                expected, _ = self.drawn(*given, self.checkpoint(kind, **changed))
                path = self.checkpoint(kind)
                got, _ = self.drawn(*given, path, "--lora", f"{file}:0.3")
                self.compare(got, expected)
                self.assertGreater((got - self.drawn(*given, path)[0]).abs().max(), 1e-2)
                # There and back.
                twice = ("--lora", f"{file}:0.3", "--lora", f"{file}:-0.3")
                self.compare(self.drawn(*given, path, *twice)[0], self.drawn(*given, path)[0], 1e-4)
                save_file(lora | {"lora_unet_other.alpha": torch.tensor(1.0)}, file)
                said = self.sample(*given, path, "--lora", file, "--describe", code=1)
                self.assertIn("lora_unet_other", said)

    def test_textual_inversions_are_words(self):
        """A word whose vectors are those of others."""
        _, folder = self.skeleton("sd1")
        given = ("--skeleton", folder, "--checkpoint", self.checkpoint("sd1"))
        words = tokenizers_of(self.pipeline("sd1"))[0]("red cat").input_ids[1:-1]
        table = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
        file = self.folder / "fox.safetensors"
        save_file({"emb_params": self.tensors("sd1")[table][words]}, file)
        latents = []
        for prompt, more in (("the red cat", ()), ("the zorro", ("--embedding", f"zorro={file}"))):
            latent = self.folder / "drawn.pt"
            self.sample(*given, *more, "--prompt", prompt, "--steps", 2, "--save-latent", latent)
            latents.append(torch.load(latent, weights_only=True))
        self.compare(latents[1], latents[0], 1e-6)

    def test_compiled_packages_run_any_checkpoint(self):
        family, folder = self.skeleton("sd1")
        out = self.folder / "compiled"
        out.mkdir()
        network = compiled_skeleton.random_network(family, None, "cpu", torch.float32)
        marks = Marks([path for _, path in network.sites() if "mid_block" in path])
        compiled_skeleton.write(family, network, out, [2], [(8, 8)], marks, lambda text: None)
        run = ("--prompt", "the red cat", "--steps", 2, "--height", 8, "--width", 8)
        for seed in (1, 2):
            torch.manual_seed(seed)
            key = "model.diffusion_model.middle_block.0.in_layers.2.weight"
            changed = {key: torch.randn(self.tensors("sd1")[key].shape) * 0.1}
            given = ("--checkpoint", self.checkpoint("sd1", torch.float16, **changed))
            given += ("--skeleton", folder)
            latents = []
            for more in ((), ("--compiled", out)):
                latent = self.folder / "drawn.pt"
                self.sample(*given, *more, *run, "--save-latent", latent)
                latents.append(torch.load(latent, weights_only=True))
            self.compare(latents[1], latents[0], 2e-5)
        said = self.sample(*given, "--compiled", out, *run, "--dtype", "fp16", "--out", "x", code=1)
        self.assertIn("--dtype fp16", said)
        _, other = self.skeleton("sd2")
        given = ("--checkpoint", self.checkpoint("sd2"), "--skeleton", other, "--compiled", out)
        said = self.sample(*given, *run, "--save-latent", self.folder / "none.pt", code=1)
        self.assertIn("compiled from the skeleton of tiny-sd2", said)
        self.assertIn("of tiny-sd1", said)

    def test_files_that_do_not_fit_are_refused(self):
        _, folder = self.skeleton("sd1")
        last = "model.diffusion_model.out.2.weight"
        for changes, names in (
            ({last: None}, last),
            ({last: torch.zeros(4, 8, 3, 3)}, last),
            ({"model.diffusion_model.something": torch.zeros(3)}, "something"),
        ):
            file = self.checkpoint("sd1", **changes)
            said = self.sample(
                *("--checkpoint", file, "--skeleton", folder, "--prompt", "cat", "--out", "x.png"),
                code=1,
            )
            self.assertIn(names, said)
            self.assertEqual(said.count("\n"), 1, said)


if __name__ == "__main__":
    unittest.main()
