"""The mistakes of a first hour with sag-export: each is one sentence with the way out."""

import contextlib
import io
import json
import os
import pathlib
import tempfile
import unittest

from sag_export.cli import parse
from sag_export.mistake import Mistake
from sag_export.source import open_source


def safetensors(path, *names):
    header = json.dumps({name: {"dtype": "F32", "shape": [0]} for name in names}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)


class Mistakes(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)
        for name in (
            "pipeline",
            "unet",
            "lora",
            "exported",
            "parent/model",
            "empty",
            "flux",
            "sd3",
        ):
            (self.folder / name).mkdir(parents=True)

        def write(name, content):
            (self.folder / name).write_text(json.dumps(content))

        write("parent/model/model_index.json", {})
        write("lora/adapter_config.json", {})
        write("exported/model.json", {})
        write("unet/config.json", {"_class_name": "UNet2DConditionModel"})
        write("flux/model_index.json", {"transformer": ["diffusers", "FluxTransformer2DModel"]})
        write("sd3/model_index.json", {"transformer": ["diffusers", "SD3Transformer2DModel"]})
        safetensors(self.folder / "sd.safetensors", "model.diffusion_model.out.0.bias")
        safetensors(self.folder / "style.safetensors", "lora_unet_mid.lora_up.weight")
        safetensors(self.folder / "lycoris.safetensors", "lycoris_unet_mid.lokr_w1")
        for name in ("sd.ckpt", "sd.gguf", "sd.onnx", "unet.ts", "mine.py", "damaged.safetensors"):
            (self.folder / name).write_bytes(b"")

    def sentence(self, *arguments):
        """What sag-export says to its user."""
        said = io.StringIO()
        try:
            with contextlib.redirect_stderr(said):
                options = parse([*map(str, arguments), "--out", str(self.folder / "out")])
                options.note = print
                open_source(options)
        except Mistake as mistake:
            return str(mistake)
        except SystemExit as end:
            self.assertEqual(end.code, 1)
            return said.getvalue().strip()
        return self.fail("nothing was said")

    def test_each_is_one_sentence_with_the_way_out(self):
        at = self.folder
        eps = ("--prediction", "eps")
        table = [
            ((at / "sd.safetensors",), "in one file", "from_single_file"),
            ((at / "damaged.safetensors",), "in one file", "from_single_file"),
            ((at / "sd.ckpt",), "in one file", "from_single_file"),
            ((at / "style.safetensors",), "LoRA", "fuse_lora"),
            ((at / "lycoris.safetensors",), "LoRA", "fuse_lora"),
            ((at / "lora",), "LoRA", "fuse_lora"),
            ((at / "sd.gguf",), "GGUF", "folder"),
            ((at / "sd.onnx",), "ONNX", "folder"),
            ((at / "unet.ts",), "exported already", "--unet"),
            ((at / "exported",), "already", "--model"),
            ((at / "mine.py",), "mine:FACTORY"),
            ((at / "parent",), "inside", '"model"'),
            ((at / "empty",), "model_index.json", "config.json"),
            ((at / "pipelin",), "do you mean", 'pipeline"?'),
            ((at / "nothing-like-it",), "there is no"),
            (("stabilityai/sdxl-turbo",), "hf download stabilityai/sdxl-turbo"),
            ((at / "unet",), "--prediction is needed"),
            ((at / "flux",), "FluxTransformer2DModel", "MODULE:FACTORY"),
            ((at / "sd3",), "SD3Transformer2DModel", "MODULE:FACTORY"),
            (("mine:Net",), "--prediction is needed"),
            (("mine:Net", *eps), "--sample is needed"),
            (("no_such_module:Net", *eps, "--sample", "4x8x8"), "cannot be called"),
            ((at / "unet", "--predicton", "eps"), "do you mean --prediction?"),
            ((at / "unet", "--prediction", "epsilon"), "invalid choice", "eps"),
            ((at / "unet", *eps, "--sample", "64x64"), "CHANNELSxHEIGHTxWIDTH"),
            ((), "SOURCE", "--help"),
        ]
        for arguments, *words in table:
            with self.subTest(" ".join(map(str, arguments))):
                sentence = self.sentence(*arguments)
                for word in words:
                    self.assertIn(word, sentence)
                self.assertNotIn("\n", sentence)
        self.assertFalse(os.path.exists(self.folder / "out"), "nothing is written")


if __name__ == "__main__":
    unittest.main()
