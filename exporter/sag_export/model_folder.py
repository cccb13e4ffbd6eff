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
    holds a model.json."""
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
    if out.exists() and not (out / "model.json").is_file():
        raise Mistake(f'--out: "{out}" is not a model directory; --force replaces nothing else.')
