"""A folder that appears only when everything in it is written."""

import contextlib
import os
import pathlib
import shutil
import tempfile

from sag_export.mistake import Mistake


@contextlib.contextmanager
def new_folder(out, force):
    """Gives a new folder OUT.*.partial, which becomes OUT at the end. `force` replaces an OUT that
    this program wrote."""
    out = pathlib.Path(out).resolve()
    check(out, force)
    partial = pathlib.Path(
        tempfile.mkdtemp(prefix=out.name + ".", suffix=".partial", dir=out.parent)
    )
    os.chmod(partial, 0o755)
    try:
        yield partial
        check(out, force)
        if out.exists():
            shutil.rmtree(out)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check(out, force):
    if not out.name or not out.parent.is_dir():
        raise Mistake(f'--out: there is no folder "{out.parent}".')
    if out.exists() and not force:
        raise Mistake(f'--out: "{out}" exists; --force replaces a model directory.')
    if out.exists() and not is_ours(out):
        raise Mistake(
            f'--out: "{out}" is not a model directory or a folder of packages; --force replaces '
            "nothing else."
        )


def is_ours(out):
    """Whether it is a model directory, or a folder of nothing but packages."""
    if not out.is_dir():
        return False
    names = [entry.name for entry in out.iterdir()]
    return "model.json" in names or (names and all(name.endswith(".pt2") for name in names))
