"""A folder that appears when everything in it is written, or not at all."""

import contextlib
import pathlib
import shutil

from export.mistake import Mistake


@contextlib.contextmanager
def new_folder(out, force):
    """Gives OUT.partial, which becomes OUT at the end. `force`: an OUT that holds a model.json is replaced."""
    out = pathlib.Path(out)
    partial = out.with_name(out.name + ".partial")
    check(out, force)
    if partial.exists():
        shutil.rmtree(partial)  # of a run that was killed
    partial.mkdir()
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
        raise Mistake(f'--out: "{out}" is no model directory, which --force would replace.')
