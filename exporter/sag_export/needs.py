"""The packages that the exporter needs."""

import contextlib
import sys


@contextlib.contextmanager
def needed_packages(program):
    """Ends the program with one sentence if a package is not installed that is imported inside."""
    try:
        yield
    except ModuleNotFoundError as missing:
        sys.exit(
            f"{program}: The package {missing.name} is missing: "
            "pip install './exporter[diffusers]' in the folder of sag installs it."
        )
