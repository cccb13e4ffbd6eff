"""The commands that sag-sample tells its user to run do what they promise."""

import os
import pathlib
import re
import subprocess
import sys
import tempfile
import unittest

import safetensors.torch
import torch

UNET = pathlib.Path(__file__).parent / "golden" / "comfy_sd15_tiny.ts"
COMMAND = os.environ.get("SAG_SAMPLE_COMMAND", "sag-sample")


class Remedies(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def sample(self, option, where):
        """Runs one step with the tensor. Returns the exit code and what was said."""
        arguments = [COMMAND, "--unet", UNET, "--no-sag", "--steps", "1", "--device", "cpu"]
        arguments += ["--threads", "1", "--save-latent", self.folder / "out.pt", option, where]
        if option != "--latent":
            arguments += ["--height", "16", "--width", "16"]
        if option != "--cond":
            context = self.folder / "context.pt"
            torch.save(torch.zeros(1, 10, 32), context)
            arguments += ["--cond", context]
        done = subprocess.run(list(map(str, arguments)), capture_output=True, text=True)
        return done.returncode, done.stderr

    def remedied(self, file, option="--cond", key=""):
        """Does as the sentence says. Returns the tensors that are read then."""
        code, said = self.sample(option, f"{file}{key}")
        self.assertEqual(code, 1, said)
        found = re.search(r'python3 (-c ".*?" "[^"]*" "([^"]*)")', said)
        self.assertTrue(found, said)
        subprocess.run(f'"{sys.executable}" {found[1]}', shell=True, check=True)
        code, said = self.sample(option, f"{found[2]}{key}")
        self.assertEqual(code, 0, said)
        return torch.load(found[2])

    def test_of_tensor_files(self):
        torch.manual_seed(0)
        pair = {"cond": torch.randn(1, 10, 32), "uncond": torch.randn(1, 10, 32)}
        kinds = {
            "numpy": {name: tensor.numpy() for name, tensor in pair.items()},
            "fp8": {name: tensor.to(torch.float8_e4m3fn) for name, tensor in pair.items()},
            "ordered": torch.nn.ParameterDict(pair).state_dict(),
            "beside": {**pair, "names": ["a", "b"], "config": torch.Size([1])},
        }
        for name, content in kinds.items():
            with self.subTest(name):
                file = self.folder / f"{name}.pt"
                torch.save(content, file)
                if self.sample("--cond", f"{file}:cond")[0] == 0:
                    continue
                read = self.remedied(file, key=":cond")
                self.assertEqual(set(read), set(pair))
                torch.testing.assert_close(
                    read["cond"], torch.as_tensor(content["cond"]).float(), rtol=0, atol=0
                )

    def test_of_old_files(self):
        file = self.folder / "old.pt"
        context = torch.randn(1, 10, 32)
        torch.save(context, file, _use_new_zipfile_serialization=False)
        self.assertTrue(self.remedied(file).equal(context))

    def test_of_latents_of_comfyui(self):
        file = self.folder / "picture.latent"
        latent = torch.randn(1, 4, 16, 16)
        version = torch.tensor([])
        safetensors.torch.save_file(
            {"latent_tensor": latent, "latent_format_version_0": version}, file
        )
        torch.testing.assert_close(self.remedied(file, "--latent"), latent * 0.18215)


if __name__ == "__main__":
    unittest.main()
