"""What the exporter and the library both know: each side is held against the other."""

import json
import os
import pathlib
import re
import subprocess
import tempfile
import unittest

import torch

from sag_export.description import CONSTANTS, model_json
from sag_export.mistake import Mistake
from sag_export.network import Concat, Network
from sag_export.sites import choose, short_name

ROOT = pathlib.Path(__file__).resolve().parent.parent
SAMPLE = os.environ.get("SAG_SAMPLE_COMMAND")


class Sites(unittest.TestCase):
    def test_short_names_are_the_librarys(self):
        """site_names_test.cpp reads the same file, where "" says that there is no short name."""
        cases = json.loads((ROOT / "tests/golden/site_names.json").read_text())
        self.assertTrue(cases)
        for case in cases:
            self.assertEqual(short_name(case["path"]), case["name"] or case["path"], case)

    def test_the_middle_block_is_found_as_the_library_finds_it(self):
        """The library's tests are FindMiddleAttention in unet_test.cpp."""
        middle = "middle_block.1.transformer_blocks.0.attn1"
        several = [(0, "down.attn1"), (2, "net.mid_block.attn"), (4, "mid_blocks.attn")]
        self.assertEqual(choose([], [(0, "a.middle.b"), (2, middle)]), [middle])
        self.assertEqual(choose([], [(0, "attn")]), ["attn"])
        self.assertEqual(choose([], several), ["net.mid_block.attn"])
        for part in ("mid", "middle", "middle_block", "mid_block", "mid_attn", "bottleneck"):
            self.assertEqual(choose([], [(0, "a"), (2, f"b.{part}.c")]), [f"b.{part}.c"])
        with self.assertRaisesRegex(Mistake, "no middle block"):
            choose([], [(0, "a"), (2, "b")])
        with self.assertRaisesRegex(Mistake, "2 self-attentions in its middle block"):
            choose([], [(0, "mid.a"), (2, "mid.b"), (4, "c")])


class Convolutions(unittest.TestCase):
    def test_the_share_is_that_of_four_dimensions(self):
        """As convolution_share in src/unet counts it: the other convolutions have no channels
        last."""
        module = torch.nn.ModuleList(
            [torch.nn.Conv2d(1, 3, 1, bias=False), torch.nn.Conv1d(1, 5, 1, bias=False)]
        )
        network = Network(module, (1, 8, 8), None, None)
        self.assertEqual(network.convolution_share(), 3 / 8)


@unittest.skipUnless(SAMPLE, "SAG_SAMPLE_COMMAND names no sag-sample")
class ModelJson(unittest.TestCase):
    """What model.json may hold: description.py writes it, the command reads it, and
    docs/model-json.md describes it."""

    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        (self.folder / "unet.ts").write_text("not a network")

    def refusal(self, **changes):
        """What the command says about a model.json."""
        network = Network(torch.nn.Identity(), (4, 8, 8), None, None)
        text = model_json("mine", {"prediction": "eps"}, network, "#0", {"unet": "unet.ts"}, 1)
        content = json.dumps({**json.loads(text), **changes})
        (self.folder / "model.json").write_text(content)
        command = [SAMPLE, "--model", self.folder, "--unconditional", "1", "--device", "cpu"]
        out = ["--save-latent", self.folder / "out.pt"]
        run = subprocess.run([*command, *out], capture_output=True, text=True)
        self.assertEqual(run.returncode, 1, run.stderr)
        return run.stderr

    def known(self, **changes):
        said = self.refusal(**changes)
        return re.search(r'the unknown key "nonsense"; known are (.+)\.\n', said)[1].split(", ")

    def test_the_predictions(self):
        said = self.refusal(prediction="nonsense")
        names = re.search(r'"prediction" must be one of (.+), got "nonsense"', said)[1]
        self.assertEqual(names.split(", "), list(CONSTANTS))

    def test_the_constants_of_each_prediction(self):
        found = {name: set(self.known(prediction=name, nonsense=1)) for name in CONSTANTS}
        common = set.intersection(*found.values())
        written = {"format", "name", "prediction", "sample", "site", "files"}
        self.assertLessEqual(written, common)
        for prediction, constants in CONSTANTS.items():
            self.assertEqual(found[prediction] - common, set(constants), prediction)

    def test_what_the_exporter_writes_is_read(self):
        """Everything is right but the file of the UNet."""
        self.assertIn("unet.ts", self.refusal())
        network = Network(torch.nn.Identity(), (4, 8, 8), None, None, classes=3, guidance=8)
        for concat in (Concat(5, "inpaint"), Concat(4, "edit", 2.5), Concat(1)):
            network.concat = concat
            written = json.loads(model_json("", {}, network, "", {}, 1))
            further = {key: written[key] for key in ("inputs", "defaults")}
            self.assertEqual(set(further["inputs"]), {"concat", "class_labels", "timestep_cond"})
            self.assertIn("draws classes: give --class N, 0 to 2", self.refusal(**further))

    def test_the_document_names_every_key(self):
        document = (ROOT / "docs/model-json.md").read_text()
        sample = {"shape": [4, 8, 8]}
        keys = {key for name in CONSTANTS for key in self.known(prediction=name, nonsense=1)}
        keys.update(self.known(sample={**sample, "nonsense": 1}))
        keys.update(self.known(files={"unet": "unet.ts", "nonsense": "x"}))
        keys.update(self.known(inputs={"nonsense": 1}))
        for name, needed in (
            ("concat", {"channels": 5}),
            ("class_labels", {}),
            ("timestep_cond", {"size": 8}),
        ):
            keys.update(self.known(inputs={name: {**needed, "nonsense": 1}}))
        keys.update(self.known(defaults={"nonsense": 1}))
        keys.update(self.known(defaults={"sag": {"nonsense": 1}}))
        self.assertGreater(len(keys), 30)
        for key in sorted(keys):
            self.assertIn(f"`{key}`", document)
        for name in CONSTANTS:
            self.assertIn(f"`{name}`", document)


if __name__ == "__main__":
    unittest.main()
