"""Runs a compiled package: python -m sag_export.run_package PACKAGE WEIGHTS CALLS RESULTS.

compiled.py starts it. WEIGHTS is the path of weights.pt, or empty. CALLS holds a list of calls,
each a tuple of tensors; RESULTS gets a list of tensors, one for each call.
"""

import contextlib
import ctypes
import sys

if sys.platform == "linux":
    # Some compilers link libstdc++ into the package. Python hides PyTorch's libstdc++ from it, so
    # there are two of them, and such a package crashed in its first regex. A global one serves
    # both, as in a C++ program.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libstdc++.so.6", ctypes.RTLD_GLOBAL)

import torch

from sag_export.attention import declare_op


@torch.no_grad()
def main(package, weights, calls, results):
    declare_op()
    calls = torch.load(calls)
    loaded = torch._inductor.aoti_load_package(package, run_single_threaded=True)
    if weights:
        known = torch.load(weights, map_location=calls[0][0].device)
        loaded.load_constants(
            {name: known[name] for name in loaded.get_constant_fqns()}, check_full_update=True
        )
    torch.save([loaded(*call) for call in calls], results)


if __name__ == "__main__":
    main(*sys.argv[1:])
