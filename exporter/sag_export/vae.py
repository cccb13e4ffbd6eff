"""A pipeline's VAE as two networks: from latents to pictures in [−1, 1], and back. Both stay in
fp32: some give NaN in half precision."""

import copy

import torch

from sag_export.mistake import Mistake


class Scale(torch.nn.Module):
    """Between the latents of the UNet and those of the VAE."""

    def __init__(self, config):
        super().__init__()
        self.factor, self.shift = (
            float(config.scaling_factor),
            float(config.get("shift_factor") or 0.0),
        )
        mean, std = config.get("latents_mean"), config.get("latents_std")
        self.normal = mean is not None and std is not None
        self.register_buffer(
            "mean", torch.tensor(mean if self.normal else [0.0]).reshape(1, -1, 1, 1)
        )
        self.register_buffer(
            "std", torch.tensor(std if self.normal else [1.0]).reshape(1, -1, 1, 1)
        )

    def plain_factor(self):
        """What undoes to_unet, where that is a factor alone."""
        if self.normal or self.shift:
            raise Mistake(
                "The VAE of a UNet that edits pictures must scale its latents by a factor alone."
            )
        return 1 / self.factor

    def to_unet(self, latent):
        if self.normal:
            return (latent - self.mean) * self.factor / self.std
        return (latent - self.shift) * self.factor

    def to_vae(self, latent):
        if self.normal:
            return latent * self.std / self.factor + self.mean
        return latent / self.factor + self.shift


def without(vae, *parts):
    """The VAE without the parts that a direction does not use: its file would hold them."""
    other = copy.copy(vae)
    other._modules = {name: part for name, part in vae._modules.items() if name not in parts}
    return other


class Decoder(torch.nn.Module):
    """[images, channels, height, width] → [images, 3, height · 8, width · 8]."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.scale = without(vae, "encoder", "quant_conv"), Scale(vae.config)

    def forward(self, latent):
        return self.vae.decode(self.scale.to_vae(latent), return_dict=False)[0]


class Encoder(torch.nn.Module):
    """The mean of the posterior."""

    def __init__(self, vae):
        super().__init__()
        self.vae, self.scale = without(vae, "decoder", "post_quant_conv"), Scale(vae.config)

    def forward(self, picture):
        return self.scale.to_unet(self.vae.encode(picture, return_dict=False)[0].mode())


def factor_of(vae):
    """Pixels per cell of the latent."""
    return 2 ** (len(vae.config.block_out_channels) - 1)
