"""How sag-export reads weights: every layout of a folder that libraries write, and nothing that no
file holds."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import types
import unittest
from unittest import mock

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel, UNet2DModel
from safetensors.torch import load_file, save_file, save_model
from transformers import CLIPTextModel, CLIPTextModelWithProjection

import make_tiny_pipeline
from sag_export import weights
from sag_export.mistake import Mistake

UNET = "diffusion_pytorch_model"
SHARDED = "60KB"


def make_unet(channels=16):
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(channels,),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        cross_attention_dim=16,
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
    )


class Case(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.unet = make_unet()
        cls.state = cls.unet.state_dict()

    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = pathlib.Path(temporary.name) / "unet"
        self.notes = []

    def load(self, variant=None, kind=UNet2DConditionModel, dtype=torch.float32, **options):
        given = types.SimpleNamespace(variant=variant, note=self.notes.append)
        return weights.load_part(kind, self.folder, dtype, given, **options)

    def check_is(self, expected, got):
        """All parameters and buffers, also those that no file holds."""
        for tensors in ("named_parameters", "named_buffers"):
            one, other = (dict(getattr(module, tensors)()) for module in (expected, got))
            self.assertEqual(list(one), list(other))
            for name in one:
                self.assertTrue(one[name].equal(other[name]), name)

    def refused(self, *parts, **options):
        with self.assertRaises(Mistake) as caught:
            self.load(**options)
        said = str(caught.exception)
        self.assertNotIn("\n", said)
        for part in parts:
            self.assertIn(part, said)
        return said

    def save(self, change=lambda name: name, **more):
        """The UNet's folder with other names of its tensors. None leaves one out."""
        self.unet.save_pretrained(self.folder)
        state = {change(name): tensor for name, tensor in self.state.items()}
        state.pop(None, None)
        save_file({**state, **more}, self.folder / f"{UNET}.safetensors", {"format": "pt"})


class Layouts(Case):
    def test_every_variant_alone_whole_or_in_shards(self):
        for variant in (None, "fp16", "bf16", "non_ema", "ema"):
            for safe in (True, False):
                for size in ("1GB", SHARDED):
                    with self.subTest(variant=variant, safe=safe, size=size):
                        shutil.rmtree(self.folder, ignore_errors=True)
                        self.unet.save_pretrained(
                            self.folder,
                            variant=variant,
                            safe_serialization=safe,
                            max_shard_size=size,
                        )
                        for name in ("model.onnx", "diffusion_flax_model.msgpack", "tf_model.h5"):
                            (self.folder / name).touch()
                        (self.folder / "openvino_model.bin").write_text("no weights")
                        self.check_is(self.unet, self.load())
        self.assertEqual(self.notes, [])

    def test_the_namings_of_sharded_variants(self):
        self.unet.save_pretrained(self.folder, max_shard_size=SHARDED)
        index = self.folder / f"{UNET}.safetensors.index.json"
        places = json.loads(index.read_text())
        index.unlink()
        stem = f"{UNET}-00001-of-"
        count = next(p.name for p in self.folder.iterdir() if p.name.startswith(stem))[len(stem) :]
        for naming in (
            f"{UNET}.fp16.safetensors.index.json",
            f"{UNET}.safetensors.index.fp16.json",
            f"{UNET}.safetensors.fp16.index.json",
        ):
            for shard in (
                f"{UNET}.fp16-%s-of-{count}",
                f"{UNET}-%s-of-{count[:5]}.fp16.safetensors",
            ):
                with self.subTest(naming, shard=shard):
                    folder = self.folder
                    self.folder = folder.with_name("renamed")
                    self.folder.mkdir()
                    self.addCleanup(shutil.rmtree, self.folder, True)
                    shutil.copy(folder / "config.json", self.folder)
                    names = {}
                    for old in sorted(set(places["weight_map"].values())):
                        names[old] = shard % old[len(UNET) + 1 :][:5]
                        shutil.copy(folder / old, self.folder / names[old])
                    where = {name: names[old] for name, old in places["weight_map"].items()}
                    (self.folder / naming).write_text(json.dumps({"weight_map": where}))
                    self.check_is(self.unet, self.load())
                    self.check_is(self.unet, self.load(variant="fp16"))
                    shutil.rmtree(self.folder)
                    self.folder = folder

    def test_several_variants(self):
        other, third = make_unet(), make_unet()
        other.conv_in.bias.data += 1
        third.conv_in.bias.data += 2
        other.save_pretrained(self.folder, variant="ema")
        third.save_pretrained(self.folder, variant="non_ema", max_shard_size=SHARDED)
        self.refused("several variants", "ema, non_ema", "--variant")
        self.check_is(other, self.load(variant="ema"))
        self.check_is(third, self.load(variant="non_ema"))
        self.unet.save_pretrained(self.folder)
        self.check_is(self.unet, self.load())
        self.assertEqual(self.notes, [])
        self.check_is(self.unet, self.load(variant="fp16"))
        self.assertRegex(self.notes[0], "no variant fp16; its plain weights are read")

    def test_text_encoders(self):
        make_tiny_pipeline.make("sdxl", self.folder.parent / "sdxl")
        for kind, name in (
            (CLIPTextModel, "text_encoder"),
            (CLIPTextModelWithProjection, "text_encoder_2"),
        ):
            expected = kind.from_pretrained(self.folder.parent / "sdxl" / name).eval()
            for safe in (True, False):
                for size in ("1GB", "40KB"):
                    for variant in (None, "fp16"):
                        with self.subTest(name, safe=safe, size=size, variant=variant):
                            shutil.rmtree(self.folder, ignore_errors=True)
                            expected.save_pretrained(
                                self.folder,
                                variant=variant,
                                safe_serialization=safe,
                                max_shard_size=size,
                            )
                            got = self.load(kind=kind, attn_implementation="eager")
                            self.check_is(expected, got)
        self.assertEqual(self.notes, [])

    def test_a_snapshot_of_the_hub(self):
        """Links into a folder of blobs; one of them may be there while its blob is not."""
        blobs = self.folder.with_name("blobs")
        self.unet.save_pretrained(blobs, max_shard_size=SHARDED)
        self.folder.mkdir()
        for i, file in enumerate(sorted(blobs.iterdir())):
            file.rename(blobs / f"{i:040x}")
            (self.folder / file.name).symlink_to(pathlib.Path("..", "blobs", f"{i:040x}"))
        self.check_is(self.unet, self.load())
        shard = next(self.folder.glob("*-00002-of-*"))
        blob = shard.resolve()
        blob.rename(blob.with_suffix(".incomplete"))
        self.refused(f'"{shard}" is a link to a file that is not there', "download")
        blob.with_suffix(".incomplete").rename(blob)
        next(self.folder.glob("*.index.json")).resolve().unlink()
        self.refused("index.json", "is a link to a file that is not there")

    def test_weights_that_are_shared_and_saved_once(self):
        self.unet.save_pretrained(self.folder)
        shared = make_unet()
        shared.mid_block.resnets[1] = shared.mid_block.resnets[0]
        save_model(shared, self.folder / f"{UNET}.safetensors", {"format": "pt"})
        held = load_file(self.folder / f"{UNET}.safetensors")
        self.assertLess(len(held), len(self.state))
        got = self.load().state_dict()
        for name, tensor in shared.state_dict().items():
            self.assertTrue(tensor.equal(got[name]), name)

    def test_attention_of_the_first_diffusers(self):
        """Stable Diffusion 1's VAE has it, and in shards, too."""
        torch.manual_seed(0)
        vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
        plain = UNet2DModel(
            block_out_channels=(16,),
            norm_num_groups=8,
            attention_head_dim=8,
            layers_per_block=1,
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("AttnUpBlock2D",),
        )
        old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
        old[".to_out.0."] = ".proj_attn."
        for expected in (vae, plain):
            for size in ("1GB", "2KB"):
                shutil.rmtree(self.folder, ignore_errors=True)
                with mock.patch.object(expected, "state_dict", lambda m=expected: renamed(m, old)):
                    expected.save_pretrained(self.folder, max_shard_size=size)
                self.check_is(expected, self.load(kind=type(expected)))

    def test_what_is_left_over_without_harm(self):
        make_tiny_pipeline.write_text_encoder(
            self.folder, CLIPTextModel, make_tiny_pipeline.write_tokenizer(self.folder / "tok")
        )
        expected = CLIPTextModel.from_pretrained(self.folder).eval()
        state = {
            **expected.state_dict(),
            "text_model.embeddings.position_ids": torch.arange(77)[None],
            "vision_model.post_layernorm.weight": torch.ones(3),
            "logit_scale": torch.ones(()),
        }
        save_file(state, self.folder / "model.safetensors", {"format": "pt"})
        self.check_is(expected, self.load(kind=CLIPTextModel))
        save_file({**state, "text_model.head": torch.ones(1)}, self.folder / "model.safetensors")
        self.refused("no use for (text_model.head)", kind=CLIPTextModel)

    def test_half_precision_is_what_from_pretrained_reads(self):
        self.unet.save_pretrained(self.folder)
        half = make_unet().half()
        half.save_pretrained(self.folder, variant="fp16")
        self.check_is(half.float(), self.load(variant="fp16"))
        self.check_is(make_unet().bfloat16(), self.load(dtype=torch.bfloat16))


def renamed(module, names):
    state = torch.nn.Module.state_dict(module)
    for new, old in names.items():
        mid = "mid_block.attentions", "blocks.0.attentions"
        state = {
            name.replace(new, old) if any(m in name for m in mid) else name: tensor
            for name, tensor in state.items()
        }
    return state


class WeightsThatDoNotFit(Case):
    def test_a_lora_that_was_not_merged(self):
        wrapped = (".to_q.", ".to_k.", ".to_v.", ".to_out.0.")

        def rename(name):
            inside = any(part in name for part in wrapped)
            return ".base_layer.".join(name.rsplit(".", 1)) if inside else name

        self.save(rename)
        count = sum(rename(name) != name for name in self.state)
        missing = next(name for name in self.state if rename(name) != name)
        self.refused(
            f"{count} tensors missing ({missing}, ",
            f"{count} tensors that it has no use for (",
            "UNet2DConditionModel",
            "a LoRA that was not merged",
            "fuse_lora()",
        )
        self.save(**{"mid_block.attentions.0.to_q.lora_A.default.weight": torch.ones(2, 2)})
        self.refused("1 tensor that it has no use for", "fuse_lora()")

    def test_a_wrappers_prefix(self):
        for prefix in ("_orig_mod.", "module.", "module._orig_mod.", "my.model."):
            self.notes.clear()
            self.save(lambda name, prefix=prefix: prefix + name)
            self.check_is(self.unet, self.load())
            self.assertIn(prefix, self.notes[0])
            self.assertEqual(len(self.notes), 1)
        inside = "mid_block."
        self.save(lambda name: name.replace(inside, inside + "_orig_mod."))
        self.refused("missing", "no use for", "wrapped module", "state_dict()")
        self.save(lambda name: "module." + name if name.startswith("down_blocks") else name)
        self.refused("missing", "no use for", "wrapped module")

    def test_a_missing_tensor_is_never_written(self):
        for name in ("conv_in.weight", "time_embedding.linear_1.bias"):
            self.save(lambda n, name=name: None if n == name else n)
            self.refused(f"1 tensor missing ({name})")

    def test_shapes_and_types(self):
        for other, said in (
            (torch.ones(16, 9, 3, 3), "[16, 9, 3, 3] and not [16, 4, 3, 3]"),
            (torch.ones(1, 4, 3, 3), "[1, 4, 3, 3] and not"),
            (torch.ones(16, 4, 3, 3, dtype=torch.int8), "of a wrong type (conv_in.weight is int8)"),
        ):
            self.save(**{"conv_in.weight": other})
            self.refused("conv_in.weight is ", said)
        make_unet(24).save_pretrained(self.folder)
        make_unet(16).save_config(self.folder)
        self.refused("tensors of another shape", "of one model")
        self.unet.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps({**config, "in_channels": 8}))
        self.refused("1 tensor of another shape (conv_in.weight")

    def test_quantized_weights_and_unknown_keys(self):
        self.unet.save_pretrained(self.folder)
        config = json.loads((self.folder / "config.json").read_text())
        (self.folder / "config.json").write_text(json.dumps({**config, "from_tomorrow": 8}))
        self.load()
        self.assertIn("1 keys that the installed diffusers does not know", self.notes[0])
        self.assertIn("from_tomorrow", self.notes[0])
        quantized = {**config, "quantization_config": {"quant_method": "bitsandbytes"}}
        (self.folder / "config.json").write_text(json.dumps(quantized))
        self.refused("quantized")

    def test_values_that_are_no_numbers(self):
        bias = self.state["conv_in.bias"].clone()
        for value in (float("nan"), float("inf")):
            bias[3] = value
            self.save(**{"conv_in.bias": bias})
            self.refused('"conv_in.bias"', "holds NaN or infinity")
        bias[3] = 1e6
        self.save(**{"conv_in.bias": bias})
        self.assertEqual(self.load().conv_in.bias[3], 1e6)
        self.refused("goes up to 1e+06", "--dtype bf16", dtype=torch.float16)

    def test_every_weight_is_nan_until_it_is_read(self):
        """If the names were not compared, the values would show it."""
        self.save(lambda name: None if name == "conv_in.bias" else name)
        copy = torch.Tensor.copy_

        def forgetful(tensor, value):
            return tensor if value is None else copy(tensor, value)

        class State(dict):
            def __missing__(self, name):
                return None

        module = make_unet()
        state = State(load_file(self.folder / f"{UNET}.safetensors"))
        with (
            mock.patch.object(weights, "check_fits"),
            mock.patch.object(weights, "not_finite", lambda name, *_: name),
            mock.patch.object(weights, "without_prefix", lambda state, *_: state),
            mock.patch.object(torch.Tensor, "copy_", forgetful),
            self.assertRaisesRegex(Mistake, "^conv_in.bias$"),
        ):
            weights.fill(module, state, self.folder, self.notes.append)


class FilesThatAreNoWeights(Case):
    def setUp(self):
        super().setUp()
        self.unet.save_pretrained(self.folder)
        self.file = self.folder / f"{UNET}.safetensors"

    def test_nothing(self):
        self.file.rename(self.folder / "pytorch_lora_weights.safetensors")
        self.refused(
            "has no weights",
            "diffusion_pytorch_model.safetensors or diffusion_pytorch_model.bin",
            "It holds config.json, pytorch_lora_weights.safetensors.",
        )
        shutil.rmtree(self.folder)
        self.refused('config.json" is not there')
        self.folder.mkdir()
        self.refused('config.json" is not there')
        (self.folder / "config.json").symlink_to("nowhere")
        self.refused('config.json" is a link to a file that is not there')

    def test_pointers_pages_and_half_files(self):
        whole = self.file.read_bytes()
        for content, said in (
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
            (b"<!DOCTYPE html><html>", "is a web page"),
            (b"", "is empty"),
            (whole[: len(whole) // 2], "cut short, download it again"),
            (whole[:20], "cut short, download it again"),
        ):
            self.file.write_bytes(content)
            self.refused(said, f'"{self.file}"')

    def test_pickles(self):
        self.file.unlink()
        file = self.folder / f"{UNET}.bin"
        torch.save(self.state, file)
        whole = file.read_bytes()
        torch.save(self.state, file, _use_new_zipfile_serialization=False)
        self.check_is(self.unet, self.load())
        file.write_bytes(whole[: len(whole) // 2])
        self.refused(f'"{file}"')
        torch.save({"state_dict": self.state, "epoch": 3}, file)
        self.refused("must hold a dict of tensors by name", "state_dict, epoch")
        torch.save({"code": unittest.TestCase}, file)
        self.refused("holds more than tensors", "save it as safetensors")

    def test_indices(self):
        self.unet.save_pretrained(self.folder.with_name("shards"), max_shard_size=SHARDED)
        index = self.folder / f"{UNET}.safetensors.index.json"
        shutil.copy(self.folder.with_name("shards") / index.name, index)
        self.check_is(self.unet, self.load())
        self.assertIn(
            "there is no such file; diffusion_pytorch_model.safetensors is", self.notes[0]
        )
        plain = self.file.read_bytes()
        self.file.unlink()
        self.refused("names ", "-00001-of-", "there is no such file")
        for file in self.folder.with_name("shards").glob("*.safetensors"):
            shutil.copy(file, self.folder)
        self.check_is(self.unet, self.load())
        self.file.write_bytes(plain)
        self.refused("has its weights twice", "move one of them away")
        self.file.unlink()
        places = json.loads(index.read_text())["weight_map"]
        name = "conv_in.weight"
        for other in ("../unet/x.safetensors", "/etc/passwd", "a\\b", 3):
            index.write_text(json.dumps({"weight_map": {**places, name: other}}))
            self.refused("must name files of its own folder", f'for "{name}"')
        index.write_text(json.dumps({"weight_map": {**places, "new": places[name]}}))
        self.refused("does not belong to", 'it says that "new"')
        index.write_text(json.dumps({"weight_map": {n: places[n] for n in places if n != name}}))
        self.refused("does not belong to", f'it does not say that "{name}"')
        index.write_text("{}")
        self.refused('must have a "weight_map"')


class Modules(unittest.TestCase):
    def test_modules_that_nothing_filled_are_refused(self):
        broken = torch.nn.Linear(2, 2)
        broken.bias.data[1] = float("nan")
        masked = torch.nn.Linear(2, 2)
        masked.register_buffer("mask", torch.full((2,), -float("inf")))
        weights.check_module("m:f", masked)
        for module, said in (
            (broken, '"bias" holds NaN'),
            (torch.nn.Linear(2, 2, device="meta"), '"weight" has no values'),
            (torch.nn.LazyLinear(2), '"weight" has no shape yet'),
        ):
            with self.assertRaisesRegex(Mistake, said):
                weights.check_module("m:f", module)


class Command(unittest.TestCase):
    """The whole program, and all that it prints."""

    def run_export(self, folder, *arguments):
        command = [sys.executable, "-m", "sag_export", str(folder), *arguments]
        environment = {k: v for k, v in os.environ.items() if not k.endswith("_VERBOSITY")}
        run = subprocess.run(command, capture_output=True, text=True, env=environment)
        self.assertEqual(run.stdout, "")
        return run.returncode, run.stderr

    def test_nothing_but_our_own_lines_is_printed(self):
        with tempfile.TemporaryDirectory() as temporary:
            folder, out = pathlib.Path(temporary, "pipeline"), pathlib.Path(temporary, "out")
            make_tiny_pipeline.make("sd1", folder)
            unet = UNet2DConditionModel.from_pretrained(folder / "unet")
            (folder / "unet" / f"{UNET}.safetensors").unlink()
            unet.half().save_pretrained(folder / "unet", variant="fp16", max_shard_size="200KB")
            (folder / "unet" / "model.onnx").touch()
            vae = AutoencoderKL.from_pretrained(folder / "vae")
            vae.save_pretrained(folder / "vae", variant="fp16")
            code, said = self.run_export(folder, "--out", out, "--variant", "fp16")
            self.assertEqual(code, 0, said)
            self.assertRegex(
                said,
                rf"\Asag-export: reading {folder}\n"
                r'sag-export: "text_encoder" has no variant fp16; its plain weights are read\n'
                rf"sag-export: the UNet: \d\.\d M parameters, fp32, torchscript\n"
                r"sag-export: the text encoder\n"
                r"sag-export: the VAE\n"
                r"sag-export: .*\n\Z",
            )
            code, said = self.run_export(folder, "--out", out, "--force", "--variant", "bf16")
            self.assertEqual(code, 1)
            self.assertEqual(
                said.splitlines()[1:],
                ["sag-export: --variant bf16: the weights have fp16, but no such variant."],
            )
            next((folder / "unet").glob("*-00002-of-*")).write_bytes(b"12345")
            code, said = self.run_export(folder, "--out", out, "--force")
            self.assertEqual((code, said.count("\n")), (1, 2), said)

    def test_a_variant_is_for_folders(self):
        code, said = self.run_export("m:f", "--out", "x", "--variant", "fp16")
        self.assertEqual(code, 1)
        self.assertIn("--variant is for folders", said)


if __name__ == "__main__":
    unittest.main()
