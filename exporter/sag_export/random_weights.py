"""Random weights for networks that are compiled without any."""

import torch


@torch.no_grad()
def randomize(module, seed):
    """Fills all parameters in place, so that the network's values stay in the range of fp16. None
    of them is the same everywhere: a compiler takes such a one for a constant."""
    torch.manual_seed(seed)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            # PyTorch's own for linear layers and convolutions.
            bound = parameter[0].numel() ** -0.5
            parameter.uniform_(-bound, bound)
        else:
            parameter.uniform_(-0.1, 0.1)
    for part in module.modules():
        if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm)) and part.weight is not None:
            part.weight += 1
