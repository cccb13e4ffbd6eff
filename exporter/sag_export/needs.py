"""What the tools need beside Python."""

import contextlib
import sys


@contextlib.contextmanager
def needed_packages(program):
    """Ends the program with one sentence where what is inside imports a package that is not installed."""
    try:
        yield
    except ModuleNotFoundError as missing:
        sys.exit(
            f"{program}: The package {missing.name} is missing: pip install torch==2.11.0 -r tools/requirements.txt"
        )
