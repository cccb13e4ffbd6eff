"""Compares written files with the modules that they were made from."""

import torch

from sag_export.mistake import Mistake

TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def check_equal(what, got, expected, dtype):
    """Throws Mistake unless the tensors are equal to the dtype's precision, relative to the largest
    value."""
    if got.shape != expected.shape:
        raise Mistake(
            f"{what} differs from the network: it returns {list(got.shape)}, "
            f"not {list(expected.shape)}."
        )
    largest = expected.abs().max().item()
    difference = (got.float() - expected.float()).abs().max().item()
    # "not <=": NaN is different, too.
    if not difference <= TOLERANCES[dtype] * largest:
        raise Mistake(
            f"{what} differs from the network by {difference:.3g}, and the largest value is "
            f"{largest:.3g}; nothing was written."
        )


@torch.no_grad()
def check_calls(what, loaded, module, calls, dtype):
    """Compares the results of all calls. A call is a tuple of tensors."""
    for call in calls:
        expected = module(*call)
        try:
            got = loaded(*call)
        except RuntimeError as error:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in call)
            last = [line for line in str(error).splitlines() if line.strip()][-1]
            raise Mistake(
                f"{what} fails for inputs of {shapes}, where the network does not: {last}"
            ) from error
        check_equal(what, got, expected, dtype)
