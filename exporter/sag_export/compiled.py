"""The UNet as compiled packages: one, or a folder of several that share their weights."""

import itertools
import os
import pathlib
import subprocess
import sys
import tempfile

import torch

from sag_export.check import check_calls
from sag_export.mistake import Mistake
from sag_export.network import first_line
from sag_export.package import bounds, write_package, write_weights
from sag_export.random_weights import randomize

# A dim is a number, (low, high), or (low, high, multiple), as write_package takes them.


def text_of(dim):
    return f"{dim[0]}-{dim[1]}" if isinstance(dim, tuple) else str(dim)


def tried(dim):
    """Two small values of a dim, greater than its multiple if possible: what is once that would be
    taken for a constant. A fixed dim gives its value twice."""
    low, high, multiple = bounds(dim)
    first = low if low > multiple else min(low + multiple, high)
    return first, min(first + multiple, high)


def dims_of(network, rows, height, width, prompts=1):
    """Name → dims, in the order of forward. The context may hold up to that many prompts."""
    dims = {"x": [rows, network.channels(), height, width], "timesteps": [rows]}
    if network.context:
        tokens, width_of_token = network.context
        tokens = (tokens, prompts * tokens, tokens) if prompts > 1 else tokens
        dims["context"] = [rows, tokens, width_of_token]
    if network.features:
        dims["y"] = [rows, network.features]
    if network.classes is not None:
        dims["class_labels"] = [rows]
    if network.guidance:
        dims["timestep_cond"] = [rows, network.guidance]
    return dims


def prompts_of(marks):
    """How many prompts a context may hold: hooks on all cross-attentions can tell two apart."""
    return 2 if marks.cross_sites else 1


def variants_of(rows, sizes):
    """Rows, height and width of each package, and its name in a folder of several."""
    return [
        ((dim, height, width), f"rows{text_of(dim)}_{text_of(height)}x{text_of(width)}.pt2")
        for dim, (height, width) in itertools.product(rows, sizes)
    ]


def write_unet(network, folder, rows, sizes, marks, say):
    """Compiles for all `rows` (dims) and `sizes` (pairs of dims). Returns the name for model.json:
    unet.pt2, or unet, a folder."""
    variants = variants_of(rows, sizes)
    if len(variants) == 1:
        path = folder / "unet.pt2"
        compile_package(network, path, variants[0][0], marks, say)
        check_package(network, path, variants[0][0], None, marks, say)
        return "unet.pt2"
    (folder / "unet").mkdir()
    weights = folder / "unet" / "weights.pt"
    write_weights(network.module, weights)
    for dims, name in variants:
        path = folder / "unet" / name
        compile_package(network, path, dims, marks, say, weights=True)
        check_package(network, path, dims, weights, marks, say)
    return "unet"


def write_skeleton(network, folder, rows, sizes, marks, skeleton, say):
    """Compiles a network of random weights without them, and changes them. `skeleton`: as
    write_package takes it."""
    variants = variants_of(rows, sizes)
    for dims, name in variants:
        compile_package(network, folder / name, dims, marks, say, skeleton=skeleton)
    # A package that holds a part of the weights that it was compiled with fails with others.
    randomize(network.module, seed=1)
    weights = folder / "weights.pt"
    write_weights(network.module, weights)
    for dims, name in variants:
        check_package(network, folder / name, dims, weights, marks, say)
    weights.unlink()


def compile_package(network, path, dims, marks, say, **options):
    """`options`: of write_package."""
    rows, height, width = dims
    say(f"compiling {path.name} for {text_of(rows)} rows of {text_of(height)} x {text_of(width)}")
    size = tried(rows)[0], tried(height)[0], tried(width)[1]
    example = network.example(*size, prompts=prompts_of(marks))
    try:
        write_package(
            network.module,
            example,
            path,
            sites=marks.sites,
            cross_sites=marks.cross_sites,
            dims=dims_of(network, *dims, prompts=prompts_of(marks)),
            **options,
        )
    # The module and the compiler are not ours: they may raise anything.
    except Exception as error:
        raise Mistake(
            f"The network cannot be compiled: {first_line(error).removesuffix('.')}."
        ) from error


def check_package(network, path, dims, weights, marks, say):
    """Compares a package with the network. `weights`: the file for one that holds none."""
    say(f"checking {path.name}")
    sizes = {tuple(bounds(dim)[0] for dim in dims), tuple(tried(dim)[1] for dim in dims)}
    calls = [
        tuple(network.example(*size, seed=1, prompts=prompts).values())
        for size in sorted(sizes)
        for prompts in range(1, 1 + prompts_of(marks))
    ]
    check_calls(
        path.name, OtherProcess(path, weights, calls), network.module, calls, calls[0][0].dtype
    )


class OtherProcess:
    """What a package returns for some calls. It runs in a process of its own (run_package.py),
    which imports only PyTorch, as sag does. A package that crashes ends that process only."""

    def __init__(self, package, weights, calls):
        with tempfile.TemporaryDirectory() as folder:
            given, results = (os.path.join(folder, name) for name in ("calls.pt", "results.pt"))
            torch.save(calls, given)
            command = [
                sys.executable,
                "-m",
                "sag_export.run_package",
                package,
                weights or "",
                given,
                results,
            ]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(python_path())}
            done = subprocess.run(
                [*map(str, command)], capture_output=True, text=True, env=environment
            )
            if done.returncode:
                raise Mistake(f"{package.name} does not run: {why(done)}.")
            self.results = iter(torch.load(results, map_location=calls[0][0].device))

    def __call__(self, *call):
        return next(self.results)


def python_path():
    """Folders where the other process finds sag_export, also where it is not installed."""
    inherited = os.environ.get("PYTHONPATH")
    return [
        str(pathlib.Path(__file__).resolve().parent.parent),
        *([inherited] if inherited else []),
    ]


def why(done):
    if done.returncode < 0:
        return f"its process was ended by signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].removesuffix(".") if lines else f"its process ended with {done.returncode}"
