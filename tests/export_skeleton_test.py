"""The shipped skeletons of checkpoints: every parameter has one place in the file, and their code
is what the exporter makes."""

import collections
import functools
import json
import os
import pathlib
import tempfile
import unittest
import zipfile

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

import make_skeletons
import make_tiny_pipeline
from sag_export import archive, skeleton

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "models" / "skeletons"
PARTS = ("unet", "text_encoder", "decoder", "encoder")
MOST_BYTES = 24 * 2**20
# What CLIP's tokenizer gives, without begin and end.
CAT = ("a photo of a cat!!", [320, 1125, 539, 320, 2368, 748])


def names_of(path):
    """An archive's names.json, without loading the archive."""
    with zipfile.ZipFile(path) as file:
        return json.loads(file.read(f"{path.stem}/extra/{skeleton.NAMES}"))


def records(path):
    """An archive's code and names.json."""
    kept = tuple(f"{path.stem}/{folder}/" for folder in ("code", "extra"))
    with zipfile.ZipFile(path) as file:
        return {n: file.read(n) for n in file.namelist() if n.startswith(kept)}


def matches(name, pattern):
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def keys_of(entry):
    return [entry["key"], *(other["key"] for other in entry.get("also", ()))]


def spelled(key, spellings):
    return [other + key[len(usual) :] for usual, other in spellings if key.startswith(usual)]


def notes_of(folder):
    return {part: names_of(folder / f"{part}.ts") for part in PARTS}


def entries_of(folder):
    """Of all parameters, by their path."""
    return {
        name: entry
        for notes in notes_of(folder).values()
        for name, entry in notes["parameters"].items()
    }


def each_family(test):
    """Makes a test of test(self, family, folder)."""

    @functools.wraps(test)
    def tests(self):
        for family in skeleton.FAMILIES.values():
            with self.subTest(family.name):
                test(self, family, FOLDER / family.name)

    return tests


class Names(unittest.TestCase):
    def expected(self, family):
        """The parameters of the whole networks, by the path in their archive."""
        places = ("clip", "clip_2")
        modules = {
            "unet": skeleton.made(UNet2DConditionModel, family.unet),
            "vae": skeleton.made(AutoencoderKL, family.vae),
        } | {
            f"{place}.states.model": skeleton.text_module(model)
            for place, model in zip(places, family.text, strict=False)
        }
        return {
            f"{place}.{name}": list(parameter.shape)
            for place, module in modules.items()
            for name, parameter in module.named_parameters()
        }

    @each_family
    def test_parameters_are_those_of_the_networks(self, family, folder):
        listed = [name for notes in notes_of(folder).values() for name in notes["parameters"]]
        self.assertEqual(len(listed), len(set(listed)))
        shapes = {name: entry["shape"] for name, entry in entries_of(folder).items()}
        self.assertEqual(shapes, self.expected(family))

    @each_family
    def test_every_tensor_of_the_file_is_used_once(self, family, folder):
        users = collections.defaultdict(list)
        for entry in entries_of(folder).values():
            users[entry["key"]].append(entry)
        for key, entries in users.items():
            if "rows" not in entries[0]:
                self.assertEqual(len(entries), 1, key)
                continue
            place = 0
            for first, last in sorted(entry["rows"] for entry in entries):
                self.assertEqual(first, place, key)
                place = last
            self.assertEqual(place, sum(entry["shape"][0] for entry in entries), key)

    @each_family
    def test_nothing_that_is_needed_is_called_unneeded(self, family, folder):
        every = notes_of(folder)
        patterns = [pattern for notes in every.values() for pattern in notes["unneeded"]]
        # Several parameters may be rows of one tensor.
        keys = [*{key for entry in entries_of(folder).values() for key in keys_of(entry)}]
        spellings = [pair for notes in every.values() for pair in notes["spellings"]]
        keys += [other for key in keys for other in spelled(key, spellings)]
        for pattern in patterns:
            found = [key for key in keys if matches(key, pattern)]
            self.assertEqual(found, [], pattern)
        # No spelling of a tensor is the name of another one.
        self.assertEqual(len(keys), len(set(keys)))
        for usual, _ in spellings:
            self.assertTrue(any(key.startswith(usual) for key in keys), usual)

    @each_family
    def test_only_channels_of_the_unet_are_free(self, family, folder):
        entries = entries_of(folder).items()
        free = {name: entry["free"] for name, entry in entries if "free" in entry}
        self.assertEqual(free, {"unet.conv_in.weight": [1]})

    @each_family
    def test_names_of_the_published_files(self, family, folder):
        """Some of each kind, as they stand in them."""
        known = {
            "sd1": (
                "model.diffusion_model.output_blocks.5.2.conv.weight",
                "cond_stage_model.transformer.text_model.final_layer_norm.weight",
                "first_stage_model.decoder.up.3.upsample.conv.weight",
            ),
            "sd2": (
                "model.diffusion_model.middle_block.1.proj_in.weight",
                "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight",
                "first_stage_model.quant_conv.weight",
            ),
            "sdxl": (
                "model.diffusion_model.label_emb.0.0.weight",
                "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
                "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc1.bias",
                "conditioner.embedders.1.model.positional_embedding",
                "conditioner.embedders.1.model.text_projection",
                "conditioner.embedders.1.model.transformer.resblocks.31.ln_1.weight",
            ),
        }
        keys = {entry["key"] for entry in entries_of(folder).values()}
        self.assertLessEqual(set(known[family.name]), keys)


class Files(unittest.TestCase):
    def test_they_are_small(self):
        files = [file for file in FOLDER.rglob("*") if file.is_file()]
        self.assertLessEqual(sum(file.stat().st_size for file in files), MOST_BYTES)

    @each_family
    def test_archives_hold_no_weights(self, family, folder):
        for part, notes in notes_of(folder).items():
            archive.check_clean(folder / f"{part}.ts")
            module = torch.jit.load(str(folder / f"{part}.ts"))
            shapes = {name: list(p.shape) for name, p in module.named_parameters()}
            self.assertEqual(
                shapes, {name: entry["shape"] for name, entry in notes["parameters"].items()}
            )
            for name, parameter in module.named_parameters():
                self.assertEqual(parameter.untyped_storage().nbytes(), 4, name)
            for name, buffer in module.named_buffers():
                self.assertEqual(buffer.device.type, "cpu", name)

    @each_family
    def test_tokenizers_pad_as_their_models_were_trained(self, family, folder):
        encoder = torch.jit.load(str(folder / "text_encoder.ts"))
        for place, model in zip(("clip", "clip_2"), family.text, strict=False):
            ids = getattr(encoder, place).tokenizer.ids(CAT[0])[0].tolist()
            begin, end = 49406, 49407
            padding = [0 if model.open_clip else end] * 69
            self.assertEqual(ids, [begin, *CAT[1], end, *padding])

    @each_family
    def test_descriptions(self, family, folder):
        shapes = {"sd1": [4, 64, 64], "sd2": [4, 64, 64], "sdxl": [4, 128, 128]}
        content = json.loads((folder / "model.json").read_text(encoding="utf-8"))
        self.assertEqual(content["name"], family.name)
        self.assertEqual(content["prediction"], "eps")
        self.assertEqual(content["sample"], {"shape": shapes[family.name], "multiple": 1})
        self.assertEqual(content["site"], "middle.0.0")
        self.assertEqual(content["files"], {part: f"{part}.ts" for part in PARTS})


class Code(unittest.TestCase):
    """Takes minutes: every network is traced again."""

    @each_family
    def test_shipped_code_is_what_the_exporter_makes(self, family, folder):
        with tempfile.TemporaryDirectory() as made:
            made = pathlib.Path(made)
            # Another vocabulary: the shipped one is only data of the same code.
            tokenizer = make_tiny_pipeline.write_tokenizer(made / "tokenizer")
            make_skeletons.write_alone(family, made, [tokenizer] * len(family.text))
            self.assertEqual((made / "model.json").read_text(), (folder / "model.json").read_text())
            differ = []
            for part in PARTS:
                new, old = (records(place / f"{part}.ts") for place in (made, folder))
                differ += [name for name in {*new, *old} if new.get(name) != old.get(name)]
            self.assertEqual(differ, [], "make them again: tools/make_skeletons.py")


if __name__ == "__main__":
    unittest.main()
