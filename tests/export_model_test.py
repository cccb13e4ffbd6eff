"""sag-export: what it writes, what it refuses, and that sag-sample draws with it."""

import contextlib
import io
import json
import os
import pathlib
import random
import re
import struct
import subprocess
import sys
import tempfile
import textwrap
import unicodedata
import unittest
import zlib

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import CLIPTokenizerFast

import make_tiny_pipeline
from sag_export import archive, compiled, export, text
from sag_export.cli import parse
from sag_export.description import from_scheduler
from sag_export.mistake import Mistake
from sag_export.network import Network
from sag_export.sites import short_name
from sag_export.source import open_source
from sag_export.tokenizer import ClipTokenizer

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = os.environ.get("SAG_SAMPLE_COMMAND")


class Case(unittest.TestCase):
    """A folder for each class, with the tiny pipelines made once."""

    @classmethod
    def setUpClass(cls):
        cls.temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(cls.temporary.cleanup)
        cls.folder = pathlib.Path(cls.temporary.name)

    def pipeline(self, kind):
        folder = self.folder / f"pipeline-{kind}"
        if not folder.exists():
            make_tiny_pipeline.make(kind, folder)
        return folder

    def export(self, source, name, *arguments):
        """The written directory and its model.json."""
        out = self.folder / name
        with contextlib.redirect_stderr(io.StringIO()):
            export.export_model(parse([str(source), "--out", str(out), *arguments]))
        self.assertFalse(out.with_name(name + ".partial").exists())
        return out, json.loads((out / "model.json").read_text())

    def mistake(self, source, *arguments):
        """The sentence that refuses; nothing is left behind."""
        before = sorted(self.folder.iterdir())
        with self.assertRaises(Mistake) as caught, contextlib.redirect_stderr(io.StringIO()):
            export.export_model(
                parse([str(source), "--out", str(self.folder / "refused"), *arguments])
            )
        self.assertEqual(sorted(self.folder.iterdir()), before)
        sentence = str(caught.exception)
        self.assertNotIn("\n", sentence)
        return sentence

    def edited(self, kind, name, path, **changes):
        """A copy of a pipeline with other values in one of its JSON files."""
        source, folder = self.pipeline(kind), self.folder / name
        folder.mkdir()
        for entry in source.iterdir():
            if entry.name != path.partition("/")[0]:
                (folder / entry.name).symlink_to(entry)
        whole = source / path
        target = folder / path
        target.parent.mkdir(exist_ok=True)
        for entry in whole.parent.iterdir() if whole.parent != source else ():
            if entry != whole:
                (target.parent / entry.name).symlink_to(entry)
        target.write_text(json.dumps({**json.loads(whole.read_text()), **changes}))
        return folder

    def module(self, name, code):
        """A Python file that can be named as name:FACTORY."""
        (self.folder / f"{name}.py").write_text(textwrap.dedent(code))
        if str(self.folder) not in sys.path:
            sys.path.insert(0, str(self.folder))
            self.addClassCleanup(sys.path.remove, str(self.folder))
        return name


MODULES = """
    import functools
    import torch
    import torch.nn.functional as F
    from torch.nn.functional import scaled_dot_product_attention

    def attend(self, tokens, attention=scaled_dot_product_attention):
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        return attention(q, k, v).transpose(1, 2).flatten(2)

    class Attention(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = torch.nn.Linear(8, 24)

        def forward(self, tokens):
            q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.into = torch.nn.Conv2d(4, 8, 3, padding=1)
            self.out = torch.nn.Conv2d(8, 4, 3, padding=1)
            self.mid_block = Attention()
            self.text = torch.nn.Linear(6, 8)

        def forward(self, x, timesteps, context):
            h = self.into(x) + (timesteps / 1000)[:, None, None, None]
            tokens = h.flatten(2).transpose(1, 2)
            tokens = tokens + self.mid_block(tokens) + self.text(context).mean(1, keepdim=True)
            return self.out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))

    class Cross(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_kv = torch.nn.Linear(6, 16)

        def forward(self, tokens, context):
            k, v = self.to_kv(context).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
            q = tokens.unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    class Prompted(Net):
        def __init__(self):
            super().__init__()
            self.attn2 = Cross()

        def forward(self, x, timesteps, context):
            h = self.into(x) + (timesteps / 1000)[:, None, None, None]
            tokens = h.flatten(2).transpose(1, 2)
            tokens = tokens + self.mid_block(tokens) + self.attn2(tokens, context)
            return self.out(tokens.transpose(1, 2).unflatten(2, h.shape[2:]))

    class Leaky(Prompted):
        def forward(self, x, timesteps, context):
            return super().forward(x, timesteps, context) + context.mean()

    class Branching(Net):
        def forward(self, x, timesteps, context):
            out = super().forward(x, timesteps, context)
            return out if x.shape[0] == 2 else 2 * out

    class Timed(Net):
        def forward(self, x, timesteps, context):
            out = super().forward(x, timesteps, context)
            return out if timesteps[0] > 500 else 2 * out

    class Large(Net):
        def forward(self, x, timesteps, context):
            out = super().forward(x, timesteps, context)
            return out if x.shape[-1] < 8 else 2 * out

    class Random(Net):
        def forward(self, x, timesteps, context):
            return super().forward(x, timesteps, context) + torch.randn_like(x)

    class Overflowing(Net):
        def forward(self, x, timesteps, context):
            return super().forward(x, timesteps, context) / 0

    class Pair(Net):
        def forward(self, x, timesteps, context):
            return super().forward(x, timesteps, context), 1

    class Deaf(Net):
        def forward(self, x, timesteps, context):
            return self.out(self.into(x))

    class Turning(Net):
        def __init__(self):
            super().__init__()
            self.register_buffer("turns", torch.ones(3, dtype=torch.complex64))

    class Multihead(Net):
        WEIGHTS = False

        def __init__(self):
            super().__init__()
            self.heads = torch.nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x, timesteps, context):
            h = self.into(x) + (timesteps / 1000)[:, None, None, None]
            tokens = h.flatten(2).transpose(1, 2)
            tokens = self.heads(tokens, tokens, tokens, need_weights=self.WEIGHTS)[0]
            tokens = tokens + self.text(context).mean(1, keepdim=True)
            return self.out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))

    class Weighing(Multihead):
        WEIGHTS = True

    class Encoding(Net):
        def __init__(self):
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
            self.mid_block = torch.nn.TransformerEncoder(layer, 2)

    class Named(Net):
        def __init__(self):
            super().__init__()
            self.mid_block.forward = functools.partial(attend, self.mid_block)

    class Scripted(Net):
        def __init__(self):
            super().__init__()
            self.mid_block = torch.jit.trace(self.mid_block, torch.ones(1, 4, 8))

    class TorchCompiled(Net):
        def __init__(self):
            super().__init__()
            self.mid_block = torch.compile(self.mid_block)
            self.text.compile()

    class PartlyScripted(Net):
        def __init__(self):
            super().__init__()
            self.text = torch.jit.script(self.text)

    class Bare(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(1))

        def forward(self, x, timesteps):
            tokens = self.scale * x.flatten(2).transpose(1, 2).unflatten(2, (2, 2)).transpose(1, 2)
            out = F.scaled_dot_product_attention(tokens, tokens, tokens)
            return out.transpose(2, 3).reshape(x.shape)

    class BareAndUnfused(Bare):
        def forward(self, x, timesteps):
            tokens = x.flatten(2)
            tokens = (tokens @ tokens.transpose(1, 2)).softmax(-1) @ tokens
            return super().forward(tokens.reshape(x.shape), timesteps)

    def scripted():
        return torch.jit.trace(Net(), (torch.ones(2, 4, 8, 8), torch.ones(2), torch.ones(2, 5, 6)))

    def broken():
        raise RuntimeError("no weights here")

    def text():
        return "text"
"""


class Tokenizer(Case):
    ALPHABETS = (
        [chr(c) for c in range(32, 127)],
        list("the cat's 'LL're 42 don't!? '' '"),
        [chr(c) for c in range(0xA0, 0x600)],
        [
            "a",
            "e",
            "o",
            "\u0301",
            "\u0323",
            "\u0308",
            "\u1100",
            "\u1161",
            "\u11a8",
            "\uac00",
            "\u0344",
            "\u212b",
            "\u0f71",
            "\u0f72",
            "İ",
            "Σ",
            "ß",
            " ",
            "\u00a0",
            "\u3000",
            "\u200b",
        ],
        ["😀", "👩‍🚀", "🇩🇪", "½", "²", "Ⅷ", "a", "1", " "],
        ["<|endoftext|>", "<|startoftext|>", "<|", "a", " ", "|>", "<|EndOfText|>", "!"],
        list("\0\t\n\r\x0b\x0c\x1c\x85 ab1\u2028\u180e\ufeff"),
    )

    def texts(self, count):
        chance = random.Random(0)
        assigned = [
            chr(c) for c in range(0x30000) if unicodedata.category(chr(c)) not in ("Cn", "Cs", "Co")
        ]
        assigned.remove(
            "\u1df6"
        )  # a mark that Unicode gave another class after the reference's tables were made
        yield from (
            "",
            " ",
            "'",
            "a" * 3000,
            "thecat" * 500,
            "ü" * 200,
            "A photo of the cat's red hat, 4k!!",
        )
        for i in range(count):
            alphabet = (*self.ALPHABETS, assigned)[i % (len(self.ALPHABETS) + 1)]
            yield "".join(chance.choice(alphabet) for _ in range(chance.randrange(40)))

    def test_ids_are_the_references(self):
        for padding in ("<|endoftext|>", "!"):
            reference = make_tiny_pipeline.write_tokenizer(
                self.folder / f"tokenizer{len(padding)}", padding
            )
            scripted = torch.jit.script(ClipTokenizer(reference, 77))
            different = [
                prompt
                for prompt in self.texts(1500)
                if scripted.ids(prompt)[0].tolist()
                != reference(prompt, padding="max_length", max_length=77, truncation=True).input_ids
            ]
            self.assertEqual(different, [])

    def test_what_is_cut_is_what_the_reference_cuts(self):
        reference = make_tiny_pipeline.write_tokenizer(self.folder / "tokenizer")
        scripted = torch.jit.script(ClipTokenizer(reference, 77))
        for words in range(60, 90):
            prompt = "A " * words
            self.assertEqual(scripted.cut(prompt), "a " * max(words - 75, 0))
        # What is left fits, and with one word more it does not.
        prompt = "a " * 70 + "ÄÖ and  MORE of the Cat"
        cut = scripted.cut(prompt)
        self.assertTrue(prompt.lower().endswith(cut))
        kept = prompt[: -len(cut)]
        self.assertLessEqual(len(reference(kept).input_ids), 77)
        self.assertGreater(len(reference(kept + cut.split()[0]).input_ids), 77)
        self.assertEqual(scripted.cut("a " * 74 + "über"), "über", "no half words")

    def test_texts_that_are_not_utf8_do_no_harm(self):
        """Python cannot pass such texts, C++ can."""
        reference = make_tiny_pipeline.write_tokenizer(self.folder / "tokenizer_bytes")
        scripted = torch.jit.script(ClipTokenizer(reference, 77))
        scripted.define(
            "def from_bytes(self, values: List[int]):\n"
            "    return self.ids(''.join([chr(value) for value in values]))\n"
        )
        chance = random.Random(0)
        for _ in range(300):
            values = bytes(
                chance.choice((0x41, 0x80, 0xBF, 0xC0, 0xC3, 0xE2, 0xED, 0xA0, 0xF0, 0xF4, 0xFF))
                for _ in range(6)
            )
            self.assertEqual(scripted.from_bytes(list(values)).shape, (1, 77))
            try:
                plain = values.decode()
            except UnicodeDecodeError:
                continue
            self.assertTrue(scripted.from_bytes(list(values)).equal(scripted.ids(plain)))


class Pipelines(Case):
    def check_texts(self, kind, out):
        """Compares the written text encoder with the pipeline's parts, often enough for TorchScript
        to optimize."""
        from transformers import CLIPTextModel, CLIPTextModelWithProjection

        source = self.pipeline(kind)
        parts = [
            CLIPTokenizerFast.from_pretrained(source / "tokenizer"),
            CLIPTextModel.from_pretrained(source / "text_encoder"),
        ]
        if kind == "sdxl":
            parts += [
                CLIPTokenizerFast.from_pretrained(source / "tokenizer_2"),
                CLIPTextModelWithProjection.from_pretrained(source / "text_encoder_2"),
            ]
        encoder = torch.jit.load(str(out / "text_encoder.ts"))
        for prompt in ["red cat!", "", "the cat's — über-schnell 🚀", "x " * 90] * 8:
            if kind == "sdxl":
                got, expected = (
                    encoder.encode(prompt, 5, 7),
                    text.expected(prompt, *parts, size=(40, 56)),
                )
                self.assertEqual(got[1][0, -6:].tolist(), [40, 56, 0, 0, 40, 56])
            else:
                got, expected = [encoder.encode(prompt)], [text.expected(prompt, *parts)]
            for one, other in zip(got, expected, strict=True):
                self.assertEqual(one.shape, other.shape)
                self.assertLessEqual((one - other).abs().max(), 1e-5 * other.abs().max())

    def check_unet(self, kind, out):
        from diffusers import UNet2DConditionModel

        unet = UNet2DConditionModel.from_pretrained(self.pipeline(kind) / "unet")
        traced = torch.jit.load(str(out / "unet.ts"))
        for rows, height, width in ((1, 16, 24), (5, 17, 9), (2, 12, 10)):
            x, timesteps = torch.randn(rows, 4, height, width), torch.linspace(1, 900, rows)
            context = torch.randn(rows, 77, unet.config.cross_attention_dim)
            with torch.no_grad():
                if kind == "sdxl":
                    y = torch.cat(
                        [
                            torch.randn(rows, 32),
                            torch.tensor([[128.0, 192, 0, 0, 128, 192]]).expand(rows, -1),
                        ],
                        1,
                    )
                    added = {"text_embeds": y[:, :32], "time_ids": y[:, 32:]}
                    got, expected = (
                        traced(x, timesteps, context, y),
                        unet(x, timesteps, context, added_cond_kwargs=added).sample,
                    )
                else:
                    got, expected = (
                        traced(x, timesteps, context),
                        unet(x, timesteps, context).sample,
                    )
            self.assertLessEqual((got - expected).abs().max(), 2e-5 * expected.abs().max())

    def check_vae(self, kind, out):
        from diffusers import AutoencoderKL

        vae = AutoencoderKL.from_pretrained(self.pipeline(kind) / "vae")
        latent, picture = torch.randn(1, 4, 9, 6), torch.rand(1, 3, 40, 72) * 2 - 1
        with torch.no_grad():
            decoded = vae.decode(latent / vae.config.scaling_factor).sample
            encoded = vae.encode(picture).latent_dist.mean * vae.config.scaling_factor
            for name, given, expected in (
                ("decoder", latent, decoded),
                ("encoder", picture, encoded),
            ):
                module = torch.jit.load(str(out / f"{name}.ts"))
                self.assertLessEqual(
                    (module(given) - expected).abs().max(), 2e-5 * expected.abs().max(), name
                )
                # Not the weights of the other direction, too.
                other = {"decoder": "vae.encoder.", "encoder": "vae.decoder."}[name]
                for parameter, _ in module.named_parameters():
                    self.assertFalse(parameter.startswith(other), parameter)

    def test_every_kind(self):
        table = {
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "timesteps": 1000,
        }
        expected = {
            "sd1": {"prediction": "eps", **table, "zero_terminal_snr": False},
            "sd2": {"prediction": "v", **table, "zero_terminal_snr": True},
            "sdxl": {"prediction": "eps", **table, "zero_terminal_snr": False},
            "flow": {"prediction": "flow", "shift": 3.0, "timestep_multiplier": 1000},
        }
        for kind in expected:
            with self.subTest(kind):
                out, model = self.export(self.pipeline(kind), kind)
                files = {
                    name: f"{name}.ts" for name in ("unet", "text_encoder", "decoder", "encoder")
                }
                rest = {
                    "sample": {"shape": [4, 16, 16], "multiple": 1},
                    "site": "middle.0.0",
                    "files": files,
                }
                self.assertEqual(
                    model, {"format": 1, "name": f"pipeline-{kind}", **expected[kind], **rest}
                )
                self.check_texts(kind, out)
                self.check_unet(kind, out)
                self.check_vae(kind, out)
                for file in files.values():
                    archive.check_clean(out / file, self.folder, __file__)

    def test_the_unets_folder_alone(self):
        out, model = self.export(
            self.pipeline("sd2") / "unet",
            "unet",
            "--prediction",
            "v",
            "--constant",
            "zero_terminal_snr=true",
            "--constant",
            "beta_schedule=linear",
            "--site",
            "#0",
            "--name",
            "mine",
            "--sample",
            "4x24x8",
        )
        self.assertEqual(sorted(entry.name for entry in out.iterdir()), ["model.json", "unet.ts"])
        self.assertEqual(model["prediction"], "v")
        self.assertIs(model["zero_terminal_snr"], True)
        self.assertEqual(model["beta_schedule"], "linear")
        self.assertEqual(
            model["site"], "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1"
        )
        self.assertEqual(model["name"], "mine")
        self.assertEqual(model["sample"]["shape"], [4, 24, 8])

    def plain_unet(self, name, sample_size, halvings=1):
        """The folder of a UNet2DModel."""
        from diffusers import UNet2DModel

        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=sample_size,
            block_out_channels=(16,) * halvings + (32,),
            layers_per_block=1,
            norm_num_groups=8,
            attention_head_dim=8,
            down_block_types=("DownBlock2D",) * halvings + ("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * halvings,
        )
        unet.save_pretrained(self.folder / name)
        return self.folder / name

    def test_sizes_are_multiples_of_what_the_unet_takes(self):
        for size, written in ((30, [3, 28, 28]), (2, [3, 4, 4]), ((9, 16), [3, 8, 16])):
            folder = self.plain_unet(f"sides-{written[1]}", size, halvings=2)
            _, model = self.export(folder, folder.name + "-out", "--prediction", "eps")
            self.assertEqual(model["sample"], {"shape": written, "multiple": 4})
        self.assertIn(
            "multiples of 4 for", self.mistake(folder, "--prediction", "eps", "--sample", "3x33x33")
        )
        _, model = self.export(folder, "sides-wide", "--prediction", "eps", "--sample", "3x32x36")
        self.assertEqual(model["sample"]["shape"], [3, 32, 36])

    def test_unets_without_text(self):
        self.plain_unet("plain", 16)
        out, model = self.export(
            self.folder / "plain",
            "plain-out",
            "--prediction",
            "eps",
            "--constant",
            "beta_schedule=linear",
        )
        self.assertEqual(model["sample"], {"shape": [3, 16, 16], "multiple": 2})
        self.assertEqual(model["site"], "unet.mid_block.attentions.0")
        if SAMPLE:
            picture = self.folder / "plain.png"
            command = [
                SAMPLE,
                "--model",
                out,
                "--unconditional",
                "1",
                "--steps",
                "2",
                "--device",
                "cpu",
                "--threads",
                "1",
                "--out",
                picture,
            ]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            self.assertIn("2 of 2 evaluations guided", said)
            self.assertEqual(struct.unpack(">II", picture.read_bytes()[16:24]), (16, 16))

    def test_all_sites_watch_the_middle(self):
        unet = self.pipeline("sd2") / "unet"
        _, model = self.export(unet, "all", "--prediction", "v", "--site", "all")
        self.assertEqual(model["site"], "middle.0.0")
        path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"  # as diffusers says it
        _, model = self.export(unet, "one", "--prediction", "v", "--site", path)
        self.assertEqual(model["site"], "unet." + path)

    def test_schedulers(self):
        from diffusers import EDMEulerScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler

        notes = []

        def described(scheduler, given=None):
            return from_scheduler(
                {"_class_name": type(scheduler).__name__, **scheduler.config}, notes.append, given
            )

        self.assertEqual(
            described(EDMEulerScheduler(sigma_max=70.0)),
            {"prediction": "edm", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 70.0},
        )
        self.assertEqual(
            described(PNDMScheduler(prediction_type="v_prediction"))["prediction"], "v"
        )
        self.assertEqual(notes, [])
        flow = described(
            FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, num_train_timesteps=500)
        )
        self.assertEqual(flow, {"prediction": "flow", "shift": 1.0, "timestep_multiplier": 500})
        self.assertEqual(len(notes), 1)
        edm = described(
            EDMEulerScheduler(sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction"),
            "edm",
        )
        self.assertEqual(
            edm, {"prediction": "edm", "sigma_data": 1.0, "sigma_min": 0.002, "sigma_max": 120.0}
        )
        self.assertEqual(
            described(FlowMatchEulerDiscreteScheduler(shift=3.0), "flow")["shift"], 3.0
        )
        self.assertEqual(len(notes), 1)
        self.assertEqual(described(FlowMatchEulerDiscreteScheduler(), "eps"), {"prediction": "eps"})
        self.assertIn("FlowMatchEulerDiscreteScheduler, tells no table", notes[-1])
        with self.assertRaisesRegex(Mistake, "logarithm, which only edm gives"):
            described(EDMEulerScheduler(), "v")

    def test_a_given_prediction_keeps_the_schedulers_constants(self):
        scheduler = "scheduler/scheduler_config.json"
        folder = self.edited("sd2", "given", scheduler, num_train_timesteps=500)
        _, said = self.export(folder, "given-none", "--unet-only")
        _, given = self.export(
            folder, "given-v", "--unet-only", "--name", said["name"], "--prediction", "v"
        )
        self.assertEqual(given, said)
        self.assertEqual((given["timesteps"], given["zero_terminal_snr"]), (500, True))
        _, eps = self.export(
            folder, "given-eps", "--unet-only", "--name", said["name"], "--prediction", "eps"
        )
        self.assertEqual(eps, {**said, "prediction": "eps"})
        shifted = self.edited("flow", "given-shift", scheduler, shift=2.5)
        _, flow = self.export(shifted, "given-flow", "--unet-only", "--prediction", "flow")
        self.assertEqual(flow["shift"], 2.5)
        cosine = self.edited("sd1", "given-cosine", scheduler, beta_schedule="squaredcos_cap_v2")
        self.assertIn("squaredcos_cap_v2", self.mistake(cosine, "--prediction", "v"))

    def test_keys_that_a_scheduler_lacks_are_its_class_own(self):
        def table(kind):
            found = from_scheduler({"_class_name": kind}, self.fail)
            return found["beta_start"], found["beta_end"], found["beta_schedule"]

        for kind in ("DDPMScheduler", "EulerDiscreteScheduler", "LMSDiscreteScheduler"):
            self.assertEqual(table(kind), (0.0001, 0.02, "linear"), kind)
        for kind in ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "DPMSolverSDEScheduler"):
            self.assertEqual(table(kind), (0.00085, 0.012, "linear"), kind)
        for kind in ("LCMScheduler", "TCDScheduler"):
            self.assertEqual(table(kind), (0.00085, 0.012, "scaled_linear"), kind)

    def test_networks_that_are_not_told_a_place_in_a_table_are_refused(self):
        config = {"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}
        for given in (None, "v"):
            with self.assertRaisesRegex(
                Mistake, '"timestep_type" must be discrete, got continuous'
            ):
                from_scheduler({**config, "prediction_type": "v_prediction"}, self.fail, given)
        edm = from_scheduler({**config, "sigma_max": 700.0, "sigma_min": None}, self.fail, "edm")
        self.assertEqual(
            edm, {"prediction": "edm", "sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 700.0}
        )

    def test_a_vae_by_its_older_name(self):
        """As latent diffusion's first text-to-image pipelines have it."""
        folder = self.edited(
            "sd1", "older", "model_index.json", vae=None, vqvae=["diffusers", "AutoencoderKL"]
        )
        (folder / "vae").rename(folder / "vqvae")
        out, model = self.export(folder, "older-out")
        self.assertEqual(model["files"]["decoder"], "decoder.ts")
        self.check_vae("sd1", out)

    def with_tokens(self, name, read, given):
        """A pipeline whose text model reads so many tokens, and whose tokenizer gives so many."""
        from transformers import CLIPTextModel

        config = "text_encoder/config.json"
        folder = self.edited("sd1", name, config, max_position_embeddings=read)
        for entry in (folder / "text_encoder").iterdir():
            entry.unlink() if entry.is_symlink() else None
        torch.manual_seed(0)
        wanted = CLIPTextModel.config_class.from_pretrained(folder / "text_encoder")
        CLIPTextModel(wanted).save_pretrained(folder / "text_encoder")
        reference = CLIPTokenizerFast.from_pretrained(folder / "tokenizer", model_max_length=given)
        (folder / "tokenizer").unlink()
        reference.save_pretrained(folder / "tokenizer")
        return folder

    def test_text_encoders_of_another_length(self):
        """600 tokens are many words: the small vocabulary has a token for almost every letter. The
        second case is Long CLIP's text model with CLIP's tokenizer."""
        for read, given, tokens in ((600, 600, 600), (248, 77, 77)):
            folder = self.with_tokens(f"long-{given}", read, given)
            options = parse([str(folder), "--out", "x"])
            export.complete(options)
            self.assertEqual(open_source(options).network.context, (tokens, 32))
            out, _ = self.export(folder, f"long-{given}-out")
            encoder = torch.jit.load(str(out / "text_encoder.ts"))
            self.assertEqual(encoder.encode("a cat").shape, (1, tokens, 32))
            self.assertEqual(encoder.cut("a " * (tokens - 1)), "a ")

    def test_half_precision(self):
        for dtype in ("bf16", "fp16"):
            out, _ = self.export(self.pipeline("sd1"), dtype, "--dtype", dtype)
            for name in ("unet", "text_encoder"):
                wanted = {"fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
                found = {p.dtype for p in torch.jit.load(str(out / f"{name}.ts")).parameters()}
                self.assertEqual(found, {wanted}, name)
            self.assertEqual(
                {p.dtype for p in torch.jit.load(str(out / "decoder.ts")).parameters()},
                {torch.float32},
            )

    def test_an_existing_directory_is_replaced_only_when_asked_to(self):
        unet = self.pipeline("sd1") / "unet"
        arguments = ("--prediction", "eps")
        out, _ = self.export(unet, "again", *arguments)
        with self.assertRaisesRegex(Mistake, "exists; --force replaces"):
            self.export(unet, "again", *arguments)
        (out / "old.txt").write_text("old")
        _, model = self.export(unet, "again", *arguments, "--force", "--name", "new")
        self.assertEqual(model["name"], "new")
        self.assertFalse((out / "old.txt").exists())
        precious = self.folder / "again.partial"
        precious.mkdir()
        link = self.folder / "link"
        link.symlink_to(out, target_is_directory=True)
        _, model = self.export(unet, "link", *arguments, "--force", "--name", "linked")
        self.assertTrue(link.is_symlink() and precious.is_dir())
        self.assertEqual(json.loads((out / "model.json").read_text())["name"], "linked")
        (self.folder / "letters").mkdir()
        (self.folder / "letters" / "to-mother.txt").write_text("dear mother")
        with self.assertRaisesRegex(Mistake, "is not a model directory"):
            self.export(unet, "letters", *arguments, "--force")
        self.assertTrue((self.folder / "letters" / "to-mother.txt").exists())

    def test_pipelines_that_do_not_fit_are_refused(self):
        index = "model_index.json"
        self.assertIn(
            "has no UNet, but a FluxTransformer2DModel",
            self.mistake(
                self.edited(
                    "sd1",
                    "flux",
                    index,
                    unet=None,
                    transformer=["diffusers", "FluxTransformer2DModel"],
                )
            ),
        )
        self.assertIn(
            "Only CLIP's text encoders",
            self.mistake(
                self.edited("sd1", "t5", index, text_encoder=["transformers", "T5EncoderModel"])
            ),
        )
        self.assertIn(
            "Only an AutoencoderKL",
            self.mistake(self.edited("sd1", "vq", index, vae=["diffusers", "VQModel"])),
        )
        scheduler = "scheduler/scheduler_config.json"
        self.assertIn(
            "KarrasVeScheduler, is not known",
            self.mistake(self.edited("sd1", "ve", scheduler, _class_name="KarrasVeScheduler")),
        )
        self.assertIn(
            "squaredcos_cap_v2",
            self.mistake(self.edited("sd1", "cos", scheduler, beta_schedule="squaredcos_cap_v2")),
        )
        self.assertIn(
            '"prediction_type" must be',
            self.mistake(self.edited("sd1", "kind", scheduler, prediction_type="noise")),
        )
        unet = "unet/config.json"
        self.assertIn(
            "takes 3 and returns 6",
            self.mistake(self.edited("sd1", "variance", unet, in_channels=3, out_channels=6)),
        )
        self.assertIn(
            "does not fit the UNet2DConditionModel of its config.json: 2 tensors",
            self.mistake(self.edited("sd1", "wide", unet, block_out_channels=[8, 8])),
        )
        self.assertIn(
            "cannot be read as a UNet2DConditionModel",
            self.mistake(self.edited("sd1", "odd", unet, block_out_channels=[9, 8])),
        )
        self.assertIn(
            "Only CLIP's text encoders",
            self.mistake(self.edited("sdxl", "refiner", index, text_encoder=None)),
        )
        self.assertIn(
            "give 32 numbers a token, but the UNet takes 64",
            self.mistake(self.edited("sdxl", "half", index, text_encoder_2=None)),
        )
        (self.folder / "empty").mkdir()
        self.assertIn(
            "SOURCE must be the folder of a diffusers pipeline", self.mistake(self.folder / "empty")
        )
        (self.folder / "damaged").mkdir()
        (self.folder / "damaged" / "config.json").write_text("{")
        self.assertIn(
            "is not a JSON file", self.mistake(self.folder / "damaged", "--prediction", "eps")
        )

    def test_options_that_do_not_fit_are_refused(self):
        unet = self.pipeline("sd1") / "unet"
        self.assertIn("--prediction is needed", self.mistake(unet))
        self.assertIn("got AutoencoderKL", self.mistake(unet.parent / "vae"))
        self.assertIn("is a file", self.mistake(unet / "config.json"))
        self.assertIn(
            "must name one of shift, timestep_multiplier",
            self.mistake(unet, "--prediction", "flow", "--constant", "beta_start=1"),
        )
        self.assertIn(
            "shift cannot be", self.mistake(unet, "--prediction", "flow", "--constant", "shift=-1")
        )
        self.assertIn(
            "names none of them. Its self-attentions are #0 unet.down",
            self.mistake(unet, "--prediction", "eps", "--site", "middle.7.0"),
        )
        self.assertIn(
            "for --format aoti", self.mistake(unet, "--prediction", "eps", "--rows", "1,2")
        )
        self.assertIn(
            "4 channels", self.mistake(unet, "--prediction", "eps", "--sample", "3x64x64")
        )
        self.assertIn(
            "for MODULE:FACTORY", self.mistake(unet, "--prediction", "eps", "--context", "77x32")
        )
        if not torch.cuda.is_available():
            self.assertIn(
                "no CUDA device", self.mistake(unet, "--prediction", "eps", "--device", "cuda")
            )
        with self.assertRaisesRegex(Mistake, "there is no folder"):
            self.export(unet, "no/where", "--prediction", "eps")
        for arguments in (
            ["--rows", "0"],
            ["--rows", "4-2"],
            ["--size", "64"],
            ["--size", "60-128/8x64"],
            ["--sample", "4x64"],
            ["--nothing"],
        ):
            with (
                self.assertRaises(SystemExit) as caught,
                contextlib.redirect_stderr(io.StringIO()) as printed,
            ):
                parse([str(unet), "--out", "x", *arguments])
            self.assertEqual(caught.exception.code, 1)
            self.assertEqual(printed.getvalue().count("\n"), 1)


class OwnModules(Case):
    ARGUMENTS = ("--prediction", "x0", "--sample", "4x8x8", "--context", "5x6")

    def setUp(self):
        self.name = self.module("own_modules", MODULES)

    def test_a_module_is_traced(self):
        out, model = self.export(f"{self.name}:Net", "net", *self.ARGUMENTS, "--multiple", "2")
        self.assertEqual(model["prediction"], "x0")
        self.assertEqual(model["sample"], {"shape": [4, 8, 8], "multiple": 2})
        self.assertEqual(model["site"], "mid_block")
        self.assertEqual(model["files"], {"unet": "unet.ts"})
        import own_modules

        inputs = torch.randn(3, 4, 10, 6), torch.tensor([1.0, 2.0, 3.0]), torch.randn(3, 5, 6)
        with torch.no_grad():
            self.assertTrue(
                torch.allclose(
                    torch.jit.load(str(out / "unet.ts"))(*inputs),
                    own_modules.Net()(*inputs),
                    atol=1e-6,
                )
            )

    def test_what_a_modules_file_sets_for_the_process_stays_out_of_the_file(self):
        self.addCleanup(torch.set_default_dtype, torch.float32)
        self.addCleanup(torch.set_default_device, None)
        text = "torch.set_default_dtype(torch.float64)\ntorch.set_default_device('meta')\n"
        name = self.module(
            "own_defaults",
            f"import torch\nfrom own_modules import Net as Made\n{text}"
            # Without it the weights would have no values.
            "def Net():\n    with torch.device('cpu'):\n        return Made()\n",
        )
        out, _ = self.export(f"{name}:Net", "defaults", *self.ARGUMENTS, "--dtype", "fp32")
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
        inputs = torch.randn(3, 4, 8, 6), torch.tensor([1.0, 2.0, 3.0]), torch.randn(3, 5, 6)
        got = torch.jit.load(str(out / "unet.ts"))(*inputs)
        self.assertEqual(got.dtype, torch.float32)
        self.assertTrue(got.isfinite().all())

    def test_an_attention_in_no_module_of_its_own_goes_by_its_ordinal(self):
        bare = self.ARGUMENTS[:-2]  # without a context
        _, model = self.export(f"{self.name}:Bare", "bare", *bare, "--site", "#0")
        self.assertEqual(model["site"], "#0")
        aoti = ("--site", "#0", "--format", "aoti", "--rows", "2", "--size", "8x8")
        self.assertIn("in a module with a name", self.mistake(f"{self.name}:Bare", *bare, *aoti))
        # The library counts attention that is written out, too.
        said = self.mistake(f"{self.name}:BareAndUnfused", *bare, "--site", "#0")
        self.assertIn("its number would not be certain", said)

    def test_cross_attention_is_marked_where_nothing_else_reads_the_context(self):
        aoti = (*self.ARGUMENTS, "--format", "aoti", "--rows", "2", "--size", "8x8")
        marks = (*aoti, "--cross-attention")
        self.assertIn("modules called attn2", self.mistake(f"{self.name}:Net", *marks))
        self.assertIn("reads it elsewhere", self.mistake(f"{self.name}:Leaky", *marks))
        import own_modules

        network = Network(own_modules.Prompted().eval(), (4, 8, 8), (5, 6), None)
        self.assertEqual(network.cross_sites(), ["attn2"])

    def test_modules_of_pytorchs_own_keep_their_attention(self):
        """In eval mode their fast path calls one op for everything."""
        for made, site, count in (
            ("Multihead", "heads", 1),
            ("Encoding", "mid_block.layers.0.self_attn", 2),
        ):
            out, model = self.export(f"{self.name}:{made}", made, *self.ARGUMENTS, "--site", site)
            self.assertEqual(model["site"], site)
            called = str(torch.jit.load(str(out / "unet.ts")).inlined_graph)
            self.assertEqual(called.count("aten::scaled_dot_product_attention"), count)
            self.assertNotIn("aten::_native_multi_head_attention", called)
            self.assertNotIn("aten::_transformer_encoder_layer_fwd", called)
            self.assertTrue(torch.backends.mha.get_fastpath_enabled())
            if SAMPLE:
                command = [SAMPLE, "--model", out, "--list-sites", "--device", "cpu"]
                self.assertIn(
                    site, subprocess.run(command, capture_output=True, text=True, check=True).stdout
                )
        self.assertIn(
            "with need_weights=False", self.mistake(f"{self.name}:Weighing", *self.ARGUMENTS)
        )

    def test_attention_that_was_imported_by_name_or_compiled(self):
        plain, _ = self.export(f"{self.name}:Net", "looked-up", *self.ARGUMENTS)
        inputs = torch.randn(2, 4, 8, 8), torch.tensor([1.0, 2.0]), torch.randn(2, 5, 6)
        expected = torch.jit.load(str(plain / "unet.ts"))(*inputs)
        for made in ("Named", "TorchCompiled"):
            out, model = self.export(f"{self.name}:{made}", made, *self.ARGUMENTS)
            self.assertEqual(model["site"], "mid_block")
            self.assertTrue(torch.jit.load(str(out / "unet.ts"))(*inputs).equal(expected))

    def test_scripted_parts(self):
        _, model = self.export(f"{self.name}:PartlyScripted", "partly", *self.ARGUMENTS)
        self.assertEqual(model["site"], "mid_block")
        self.assertIn(
            'attention of "mid_block" cannot be seen',
            self.mistake(f"{self.name}:Scripted", *self.ARGUMENTS),
        )

    def test_traces_that_differ_leave_nothing(self):
        for made in ("Branching", "Timed", "Large", "Random"):
            with self.subTest(made):
                said = self.mistake(f"{self.name}:{made}", *self.ARGUMENTS)
                self.assertIn("unet.ts differs from the network", said)

    def test_missing_packages_are_named_in_one_sentence(self):
        programs = (
            ("sag-export", ROOT / "exporter", "-m", "sag_export", "nowhere", "--out", "x"),
            ("make_tiny_pipeline.py", ROOT, "tools/make_tiny_pipeline.py", "sd1", "x"),
            (
                "make_benchmark_unet.py",
                ROOT,
                "tools/make_benchmark_unet.py",
                "--shape",
                "sd15",
                "--out",
                "x",
            ),
        )
        for name, folder, *arguments in programs:
            with self.subTest(name):  # -S and -E: without installed packages
                command = [sys.executable, "-S", "-E", *arguments]
                run = subprocess.run(command, capture_output=True, text=True, cwd=folder)
                self.assertEqual(run.returncode, 1)
                self.assertRegex(
                    run.stderr, rf"\A{name}: The package torch is missing: pip install .+\n\Z"
                )

    def test_modules_that_do_not_fit_are_refused(self):
        name, fits = self.name, self.ARGUMENTS
        self.assertIn("finite", self.mistake(f"{name}:Overflowing", *fits))
        self.assertIn("must return a tensor, got tuple", self.mistake(f"{name}:Pair", *fits))
        self.assertIn("No self-attention", self.mistake(f"{name}:Deaf", *fits))
        self.assertIn("no weights here", self.mistake(f"{name}:broken", *fits))
        self.assertIn("must return a torch.nn.Module, got str", self.mistake(f"{name}:text", *fits))
        self.assertIn("own_modules.py has no nothing", self.mistake(f"{name}:nothing", *fits))
        self.assertIn('complex "turns"', self.mistake(f"{name}:Turning", *fits))
        self.assertIn("is TorchScript already", self.mistake(f"{name}:scripted", *fits))
        self.assertIn(
            "multiples of --multiple", self.mistake(f"{name}:Net", *fits, "--multiple", "3")
        )
        size = ("--multiple", "4", "--format", "aoti", "--size", "8x6")
        self.assertIn("multiple of 4", self.mistake(f"{name}:Net", *fits, *size))
        self.assertIn("cannot be called", self.mistake("nowhere_at_all:Net", *fits))
        self.assertIn(
            "The network fails for x [2, 4, 2, 3]", self.mistake(f"{name}:Net", *fits[:-1], "5x7")
        )
        self.assertIn("--sample is needed", self.mistake(f"{name}:Net", "--prediction", "eps"))
        self.assertIn("--prediction is needed", self.mistake(f"{name}:Net", *fits[2:]))


def png(path, width, height):
    rows = b"".join(
        b"\0" + bytes((x * 3 + y * 5 + c * 60) % 256 for x in range(width) for c in range(3))
        for y in range(height)
    )
    parts = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    chunks = (
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in parts
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


@unittest.skipUnless(SAMPLE, "SAG_SAMPLE_COMMAND names no sag-sample")
class Command(Case):
    def sample(self, *arguments, code=0):
        run = subprocess.run(
            [SAMPLE, *map(str, arguments), "--device", "cpu", "--threads", "1"],
            capture_output=True,
            text=True,
        )
        self.assertEqual(run.returncode, code, run.stderr)
        return run.stdout if code == 0 else run.stderr

    def test_it_draws_with_what_was_written(self):
        for kind in ("sd2", "sdxl"):
            with self.subTest(kind):
                model, _ = self.export(self.pipeline(kind), kind)
                picture, report = self.folder / f"{kind}.png", self.folder / f"{kind}.json"
                said = self.sample(
                    "--model",
                    model,
                    "--prompt",
                    "a red cat",
                    "--prompt",
                    "many words " * 40,
                    "--steps",
                    "2",
                    "--width",
                    "24",
                    "--out",
                    picture,
                    "--json",
                    report,
                )
                self.assertIn("longer than the text encoder reads (77 tokens); left out:", said)
                self.assertIn("2 of 2 evaluations guided", said)
                width, height = struct.unpack(">II", picture.read_bytes()[16:24])
                self.assertGreater(width, 24 * 8)
                self.assertGreater(height, 2 * 16 * 8)
                self.assertEqual(json.loads(report.read_text())["guided_steps"], 2)

    def test_its_attentions_are_the_exporters(self):
        """The exporter finds them by what modules are given, the library by projections in the
        graph."""
        name = self.module("own_modules", MODULES)
        arguments = {f"{name}:{made}": OwnModules.ARGUMENTS for made in ("Multihead", "Encoding")}
        arguments.update({self.pipeline(kind): ("--unet-only",) for kind in ("sd1", "sdxl")})
        for source, rest in arguments.items():
            options = parse([str(source), "--out", "x", *rest])
            export.complete(options)
            network = open_source(options).network
            found = network.sites()
            out, _ = self.export(source, f"sites-{len(found)}", *rest, "--site", f"#{found[0][0]}")
            said = self.sample("--model", out, "--list-sites")
            own, _, cross = said.partition("ross-attentions")
            listed = re.findall(r"^[* ] (\S+) +#(\d+)", own, re.M)
            wanted = [(short_name(path), str(ordinal)) for ordinal, path in found]
            self.assertEqual(listed, wanted, source)
            paths = re.findall(r"\S+\.attn2\b", cross)
            wanted = [] if rest == OwnModules.ARGUMENTS else network.cross_sites()
            self.assertEqual(paths, wanted, source)

    def test_it_starts_from_a_picture(self):
        model, _ = self.export(self.pipeline("flow"), "flow")
        png(self.folder / "photo.png", 136, 72)
        out = self.folder / "latent.pt"
        arguments = (
            "--model",
            model,
            "--prompt",
            "the cat",
            "--image",
            self.folder / "photo.png",
            "--denoise",
            "0.1",
            "--steps",
            "1",
        )
        self.sample(*arguments, "--save-latent", out)
        self.assertEqual(torch.load(out, weights_only=True).shape, (1, 4, 9, 17))
        png(self.folder / "photo.png", 137, 72)
        self.assertIn(
            "out of 72 x 137 pixels", self.sample(*arguments, "--save-latent", out, code=1)
        )

    def test_its_encoder_gives_the_contexts_of_the_file(self):
        """By the prompt, and by the tensors that Python gets from the same file."""
        model, _ = self.export(self.pipeline("sdxl"), "again")
        encoder = torch.jit.load(str(model / "text_encoder.ts"))
        tensors = {}
        for name, prompt in (("cond", "It's — 🚀"), ("uncond", "")):
            tensors[name], tensors[name + "_y"] = encoder.encode(prompt, 16, 16)
        torch.save(tensors, self.folder / "text.pt")
        both = ("--steps", "2", "--quiet", "--save-latent")
        self.sample("--model", model, "--prompt", "It's — 🚀", *both, self.folder / "a.pt")
        given = [
            f"{self.folder / 'text.pt'}:{name}" for name in ("cond", "uncond", "cond_y", "uncond_y")
        ]
        options = [
            part
            for pair in zip(("--cond", "--uncond", "--cond-y", "--uncond-y"), given, strict=True)
            for part in pair
        ]
        self.sample("--model", model, *options, *both, self.folder / "b.pt")
        a, b = (torch.load(self.folder / name, weights_only=True) for name in ("a.pt", "b.pt"))
        self.assertLessEqual((a - b).abs().max(), 1e-6 * a.abs().max())


class Compiled(Case):
    """Each package costs tens of seconds of g++, so there are few."""

    def latent(self, model, name, *arguments):
        out = self.folder / name
        subprocess.run(
            [
                SAMPLE,
                "--model",
                model,
                "--prompt",
                "a red cat",
                "--steps",
                "2",
                "--quiet",
                "--threads",
                "2",
                "--device",
                "cpu",
                "--save-latent",
                out,
                *arguments,
            ],
            check=True,
        )
        return torch.load(out, weights_only=True)

    @unittest.skipUnless(SAMPLE, "SAG_SAMPLE_COMMAND names no sag-sample")
    def test_it_draws_what_torchscript_draws(self):
        traced, _ = self.export(self.pipeline("sdxl"), "traced")
        package, model = self.export(
            self.pipeline("sdxl"),
            "compiled",
            "--format",
            "aoti",
            "--rows",
            "1-3",
            "--size",
            "16x24",
            "--cross-attention",
        )
        self.assertEqual(model["files"]["unet"], "unet.pt2")
        self.assertEqual(model["sample"], {"shape": [4, 16, 24], "multiple": 2})
        picture = self.folder / "picture.png"
        got = self.latent(package, "compiled.pt", "--out", picture)
        expected = self.latent(traced, "traced.pt", "--width", "24")
        self.assertLessEqual((got - expected).abs().max(), 5e-5 * expected.abs().max())
        self.assertEqual(struct.unpack(">II", picture.read_bytes()[16:24]), (24 * 8, 16 * 8))
        nag = ("--cfg", "1", "--negative", "a dog", "--guidance", "nag")
        got = self.latent(package, "compiled.pt", *nag)
        without = expected
        expected = self.latent(traced, "traced.pt", "--width", "24", *nag)
        self.assertLessEqual((got - expected).abs().max(), 5e-5 * expected.abs().max())
        self.assertGreater((expected - without).abs().max(), 1e-3 * expected.abs().max())

    def test_packages_that_share_their_weights(self):
        name = self.module("own_modules", MODULES)
        arguments = ("--format", "aoti", "--rows", "2,3-4", "--size", "8x6", "--site", "all")
        out, model = self.export(f"{name}:Net", "folder", *OwnModules.ARGUMENTS, *arguments)
        self.assertEqual(model["files"], {"unet": "unet"})
        self.assertEqual(model["sample"]["shape"], [4, 8, 6])
        self.assertEqual(
            sorted(entry.name for entry in (out / "unet").iterdir()),
            ["rows2_8x6.pt2", "rows3-4_8x6.pt2", "weights.pt"],
        )
        self.assertEqual(model["site"], "mid_block")

    def test_packages_that_do_not_run_are_refused(self):
        call = (torch.zeros(2, 4, 8, 8), torch.zeros(2))
        package = self.folder / "no.pt2"
        package.write_bytes(b"PK\x03\x04 no package")
        with self.assertRaises(Mistake) as caught:
            compiled.OtherProcess(package, None, [call])
        self.assertIn("no.pt2 does not run: ", str(caught.exception))

    def test_a_program_that_died_says_how(self):
        for code, printed, said in (
            (-11, "", "signal 11"),
            (1, "Trace\nWrong: x.\n\n", "Wrong: x"),
            (3, "", "with 3"),
        ):
            self.assertIn(said, compiled.why(subprocess.CompletedProcess([], code, "", printed)))

    def test_what_cannot_be_compiled_leaves_nothing(self):
        name = self.module("own_modules", MODULES)
        self.assertIn(
            "multiples of 2",
            self.mistake(
                self.pipeline("sd1"), "--format", "aoti", "--unet-only", "--size", "17-32x16"
            ),
        )
        self.assertIn(
            "cannot be compiled",
            self.mistake(f"{name}:Branching", *OwnModules.ARGUMENTS, "--format", "aoti"),
        )


if __name__ == "__main__":
    unittest.main()
