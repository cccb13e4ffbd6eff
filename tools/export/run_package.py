"""Runs a compiled package: run_package.py PACKAGE WEIGHTS CALLS RESULTS DEVICE. compiled.py calls it.

WEIGHTS is weights.pt, or empty; CALLS and RESULTS are what examples/run_unet.cpp takes and writes.
"""

import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
from export.attention import declare_op  # noqa: E402


@torch.no_grad()
def main(package, weights, calls, results, device):
    declare_op()
    calls = torch.load(calls, map_location=device)
    loaded = torch._inductor.aoti_load_package(package, run_single_threaded=True)
    if weights:
        known = torch.load(weights, map_location=device)
        loaded.load_constants({name: known[name] for name in loaded.get_constant_fqns()}, check_full_update=True)
    torch.save(torch.cat([loaded(*call.values()).cpu().float().flatten() for call in calls]), results)


if __name__ == "__main__":
    main(*sys.argv[1:])
