"""The UNet of a family of checkpoints, compiled without weights: one folder of packages runs every
checkpoint of the family."""

import torch

from sag_export import compiled, skeleton, unet
from sag_export.random_weights import randomize

# Channels that x holds after the latent's, for the kinds of --concat.
CONCAT = {None: 0, "inpaint": 5, "edit": 4}


def random_network(family, concat, device, dtype):
    """The Network of a family, with random weights. concat: --concat."""
    from diffusers import UNet2DConditionModel

    channels = 4 + CONCAT.get(concat, concat)
    with torch.device("meta"):
        module = UNet2DConditionModel(**{**family.unet, "in_channels": channels})
    # to_empty leaves them undefined.
    assert not list(module.buffers())
    module = module.to(dtype).to_empty(device=device).requires_grad_(False)
    randomize(module, seed=0)
    return unet.wrap(module, skeleton.TOKENS)


def write(family, network, folder, rows, sizes, marks, say):
    """Writes the packages into a folder. `rows` and `sizes`: as compiled.write_unet takes them."""
    names = skeleton.unet_names(network.module)
    compiled.write_skeleton(network, folder, rows, sizes, marks, (family.name, names), say)
