"""Runs a compiled package: python -m sag_export.run_package PACKAGE WEIGHTS CALLS RESULTS. compiled.py calls it.

WEIGHTS is weights.pt, or empty; CALLS a list of calls, each a tuple of tensors; RESULTS gets a tensor for each.
"""

import contextlib
import ctypes
import sys

if sys.platform == "linux":
    # A compiler that links libstdc++ into what it makes leaves a package with two of them, its own and PyTorch's, which
    # Python keeps from it: it died in its first regex. Made global, PyTorch's serves both, as in a C++ program.
    with contextlib.suppress(OSError):
        ctypes.CDLL("libstdc++.so.6", ctypes.RTLD_GLOBAL)

import torch  # noqa: E402

from sag_export.attention import declare_op  # noqa: E402


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
