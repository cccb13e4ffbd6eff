"""Packages of a skeleton, which run every checkpoint of a family."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import tempfile
import unittest
import unittest.mock
import zipfile

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import torch
from safetensors.torch import load_file, save_file

import sag_export
from sag_export import compiled, compiled_skeleton, export, ldm_names, model_folder, skeleton
from sag_export.check import check_calls
from sag_export.cli import parse
from sag_export.mistake import Mistake
from sag_export.random_weights import randomize
from sag_export.sites import Marks

TINY = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 24,
    "sample_size": 16,
    # The middle block has attentions; more of them only take more of g++'s time.
    "down_block_types": ("DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D"),
}
SIZES = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 32,
    "use_linear_projection": True,
}


def family(name, **changes):
    return dataclasses.replace(skeleton.FAMILIES[name], unet={**TINY, **changes})


FAMILIES = {"sd1": family("sd1"), "sd2": family("sd2"), "sdxl": family("sdxl", **SIZES)}


def write_checkpoint(network, path):
    """The UNet as a checkpoint in one file holds it."""
    names = ldm_names.unet_names(network.module.unet)
    tensors = {
        names[name].key: parameter.detach().contiguous()
        for name, parameter in network.module.unet.named_parameters()
    }
    save_file(tensors, path)


def read_package(path):
    """The metadata and names.json."""
    with zipfile.ZipFile(path) as archive:
        (metadata,) = (
            name for name in archive.namelist() if name.endswith("wrapper_metadata.json")
        )
        (names,) = (name for name in archive.namelist() if name.endswith("/extra/names.json"))
        return json.loads(archive.read(metadata)), json.loads(archive.read(names))


def weights_of(checkpoint, package):
    """What the library makes of a checkpoint: the package's names, dtypes and strides."""
    file, (metadata, names) = load_file(checkpoint), read_package(package)
    weights = {}
    for line in metadata["sag.weights"].splitlines():
        name, dtype, sizes, strides = line.split()
        sizes, strides = (tuple(map(int, part.split(","))) for part in (sizes, strides))
        entry = names["parameters"].pop(name)
        assert entry["shape"] == list(sizes), name
        weights[name] = torch.empty_strided(sizes, strides, dtype=getattr(torch, dtype))
        weights[name].copy_(file.pop(entry["key"]))
    assert not names["parameters"] and not file
    return weights


class CompiledSkeletons(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        tiny = unittest.mock.patch.dict(skeleton.FAMILIES, FAMILIES)
        tiny.start()
        self.addCleanup(tiny.stop)

    def export(self, *arguments):
        out = self.folder / "out"
        with contextlib.redirect_stderr(io.StringIO()) as progress:
            export.export_model(parse(["--out", str(out), *arguments]))
        self.progress = progress.getvalue()
        self.assertEqual([entry.name for entry in self.folder.iterdir()], ["out"])
        return out

    def check_runs(self, package, network, seed, rows):
        """Runs a checkpoint of other weights on a package. Returns the network's result."""
        randomize(network.module, seed)
        checkpoint, weights = self.folder / "one.safetensors", self.folder / "weights.pt"
        write_checkpoint(network, checkpoint)
        torch.save(weights_of(checkpoint, package), weights)
        calls = [tuple(network.example(rows, 8, 8).values())]
        runs = compiled.OtherProcess(package, weights, calls)
        check_calls(package.name, runs, network.module, calls, calls[0][0].dtype)
        return network.module(*calls[0])

    def test_a_folder_of_packages_runs_several_checkpoints(self):
        layout = ("--channels-last", "on", "--concat", "inpaint")
        sizes = ("--format", "aoti", "--rows", "1,2", "--size", "8x8")
        out = self.export("--skeleton", "sdxl", *sizes, *layout)
        packages = sorted(out.iterdir())
        self.assertEqual([path.name for path in packages], ["rows1_8x8.pt2", "rows2_8x8.pt2"])
        self.assertIn("compiling rows2_8x8.pt2 for 2 rows of 8 x 8", self.progress)
        one, two = (read_package(path)[0] for path in packages)
        for key in ("sag.model", "sag.skeleton", "sag.weights", "sag.sites"):
            self.assertEqual(one[key], two[key])
        self.assertEqual(one["sag.skeleton"], "sdxl")
        self.assertIn("x float32 2 9 8 8", two["sag.inputs"])
        self.assertIn("unet.conv_in.weight float32 16,9,3,3 81,1,27,9", one["sag.weights"])
        self.assertIn("mid_block.attentions.0.transformer_blocks.0.attn1", one["sag.sites"])
        network = compiled_skeleton.random_network(
            FAMILIES["sdxl"], "inpaint", "cpu", torch.float32
        )
        for rows, package in enumerate(packages, start=1):
            # The same inputs.
            first, second = (self.check_runs(package, network, seed, rows) for seed in (5, 6))
            self.assertGreater((first - second).abs().max(), 0.1 * first.abs().max())
        # --force replaces a folder of packages, and nothing else.
        model_folder.check(out, force=True)
        (out / "mine.txt").write_text("mine")
        with self.assertRaisesRegex(Mistake, "is not a model directory or a folder of packages"):
            model_folder.check(out, force=True)

    def mistake(self, *arguments):
        with self.assertRaises(Mistake) as caught, contextlib.redirect_stderr(io.StringIO()):
            export.export_model(parse(["--out", str(self.folder / "refused"), *arguments]))
        self.assertEqual(list(self.folder.iterdir()), [])
        self.assertNotIn("\n", str(caught.exception))
        return str(caught.exception)

    def test_the_command_line_knows_the_families(self):
        self.assertEqual(tuple(skeleton.FAMILIES), sag_export.FAMILIES)

    def test_refuses_what_makes_no_sense(self):
        one = ("--skeleton", "sd1")
        self.assertIn("in place of SOURCE", self.mistake("model", *one, "--format", "aoti"))
        self.assertIn("needs --format aoti", self.mistake(*one))
        aoti = (*one, "--format", "aoti")
        self.assertIn("--prediction is for a model", self.mistake(*aoti, "--prediction", "v"))
        self.assertIn("--unet-only is for a model", self.mistake(*aoti, "--unet-only"))
        self.assertIn("--multiple is for a model", self.mistake(*aoti, "--multiple", "2"))
        self.assertIn("multiples of 2", self.mistake(*aoti, "--size", "7-9x8"))
        self.assertIn("names none of them", self.mistake(*aoti, "--site", "nothing"))
        for arguments, says in ((["--skeleton", "sd3"], "sd1"), ([], "SOURCE or --skeleton")):
            with self.assertRaises(SystemExit), contextlib.redirect_stderr(io.StringIO()) as said:
                parse(["--out", "x", *arguments])
            self.assertIn(says, said.getvalue())

    def test_a_package_that_holds_weights_is_refused(self):
        """The compiler would have folded a part of them into the code."""
        network = compiled_skeleton.random_network(FAMILIES["sd1"], None, "cpu", torch.float32)
        before = {name: value.clone() for name, value in network.module.state_dict().items()}

        def write(module, example, out, **options):
            out.write_bytes(b"")

        class Folded:
            def __init__(self, *arguments):
                pass

            def __call__(self, *call):
                return torch.func.functional_call(network.module, before, call)

        with (
            unittest.mock.patch.object(compiled, "write_package", write),
            unittest.mock.patch.object(compiled, "OtherProcess", Folded),
            self.assertRaisesRegex(Mistake, "differs from the network"),
        ):
            compiled_skeleton.write(
                FAMILIES["sd1"], network, self.folder, [2], [(8, 8)], Marks([]), lambda text: None
            )


class RandomWeights(unittest.TestCase):
    def test_no_parameter_is_constant(self):
        network = compiled_skeleton.random_network(FAMILIES["sdxl"], None, "cpu", torch.float16)
        for name, parameter in network.module.named_parameters():
            self.assertGreater(parameter.float().std(), 0, name)
            self.assertTrue(parameter.isfinite().all(), name)
        network.check()


if __name__ == "__main__":
    unittest.main()
