"""The exporter as an installed package: the command that pip makes, and versions that agree."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

import sag_export

ROOT = pathlib.Path(__file__).resolve().parent.parent


def setuptools_version():
    try:
        return int(importlib.metadata.version("setuptools").partition(".")[0])
    except importlib.metadata.PackageNotFoundError:
        return 0


class Installed(unittest.TestCase):
    @unittest.skipIf(setuptools_version() < 77, "setuptools 77 or newer is not installed")
    def test_pip_makes_the_command(self):
        with tempfile.TemporaryDirectory() as folder:
            source, target = pathlib.Path(folder, "exporter"), pathlib.Path(folder, "target")
            # A copy: setuptools leaves a folder "build" beside pyproject.toml.
            shutil.copytree(ROOT / "exporter", source)
            pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps"]
            install = [*pip, "--no-build-isolation", "--target", target, source]
            done = subprocess.run(install, capture_output=True, text=True)
            self.assertEqual(done.returncode, 0, done.stderr)
            # -S: without any installed package. What it prints needs none of them.
            run = subprocess.run(
                [sys.executable, "-S", target / "bin" / "sag-export", "--help"],
                env={**os.environ, "PYTHONPATH": str(target)},
                capture_output=True,
                text=True,
            )
            self.assertEqual(run.returncode, 0, run.stderr)
            self.assertIn("usage: sag-export", run.stdout)
            (metadata,) = target.glob("sag_export-*.dist-info/METADATA")
            text = metadata.read_text()
            for line in (
                f"Version: {sag_export.__version__}",
                "License-Expression: Apache-2.0",
                "Requires-Dist: torch==2.11.0",
                'Requires-Dist: diffusers==0.35.2; extra == "diffusers"',
            ):
                self.assertIn(line + "\n", text)

    def test_the_version_is_the_librarys(self):
        header = (ROOT / "include/sag/version.h").read_text()
        parts = re.findall(r"#define SAG_VERSION_(?:MAJOR|MINOR|PATCH) (\d+)", header)
        self.assertEqual(sag_export.__version__, ".".join(parts))

    def test_pytorchs_version_is_the_one_that_is_tested(self):
        wanted = re.search(
            r"^set\(sag_torch_tested (.+)\)$", (ROOT / "cmake/SagTorch.cmake").read_text(), re.M
        )
        self.assertIn(f'"torch=={wanted[1]}"', (ROOT / "exporter/pyproject.toml").read_text())


if __name__ == "__main__":
    unittest.main()
