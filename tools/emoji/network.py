"""The UNet. Its modules have the names of Stable Diffusion's, so that SAG's site is
middle_block.1.transformer_blocks.0.attn1, as there."""

import math

import torch
import torch.nn.functional as F
from torch import nn

import text

# Channels of one attention head.
HEAD = 32
# The finest level works on 2x2 pixels at once.
UNSHUFFLE = 2


def zeroed(module):
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


class ResBlock(nn.Module):
    def __init__(self, inputs, outputs, embedding):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(8, inputs), nn.SiLU(), nn.Conv2d(inputs, outputs, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * outputs))
        self.out_norm = nn.GroupNorm(8, outputs)
        self.out_layers = nn.Sequential(
            nn.SiLU(), zeroed(nn.Conv2d(outputs, outputs, 3, padding=1))
        )
        self.skip_connection = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, x, emb):
        scale, shift = self.emb_layers(emb)[:, :, None, None].chunk(2, 1)
        h = self.out_norm(self.in_layers(x)) * (1 + scale) + shift
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    def __init__(self, channels, context):
        super().__init__()
        self.heads = channels // HEAD
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(context, channels, bias=False)
        self.to_v = nn.Linear(context, channels, bias=False)
        self.to_out = nn.Sequential(nn.Linear(channels, channels), nn.Identity())

    def split_heads(self, x):
        return x.unflatten(-1, (self.heads, HEAD)).transpose(1, 2)

    def forward(self, x, context):
        q, k, v = (
            self.split_heads(self.to_q(x)),
            self.split_heads(self.to_k(context)),
            self.split_heads(self.to_v(context)),
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        x, gate = self.proj(x).chunk(2, -1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.net = nn.Sequential(
            GEGLU(channels, 2 * channels), nn.Identity(), nn.Linear(2 * channels, channels)
        )

    def forward(self, x):
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    def __init__(self, channels, context):
        super().__init__()
        self.attn1 = CrossAttention(channels, channels)
        self.ff = FeedForward(channels)
        self.attn2 = CrossAttention(channels, context)
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(channels),
            nn.LayerNorm(channels),
            nn.LayerNorm(channels),
        )

    def forward(self, x, context):
        tokens = self.norm1(x)
        x = x + self.attn1(tokens, tokens)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    def __init__(self, channels, context):
        super().__init__()
        self.norm = nn.GroupNorm(8, channels)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList([BasicTransformerBlock(channels, context)])
        self.proj_out = zeroed(nn.Linear(channels, channels))

    def forward(self, x, context):
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block in self.transformer_blocks:
            h = block(h, context)
        return x + self.proj_out(h).transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class TimestepEmbedSequential(nn.Sequential):
    def forward(self, x, emb, context):
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNet(nn.Module):
    """forward(x [N, 3, H, W], timesteps [N] = 0.25 ln sigma, context [N, T, 128]) -> the raw
    output; H and W multiples of 8.

    Inputs may have any floating type: they are cast to the weights' type, the timesteps only after
    their sines are taken in fp32.
    """

    def __init__(
        self,
        channels=(64, 96, 160),
        blocks=(2, 1, 1),
        attention=(False, True, True),
        embedding=192,
        context=text.WIDTH,
    ):
        super().__init__()
        frequencies = torch.exp(torch.linspace(math.log(0.5), math.log(60.0), 32))
        self.register_buffer(
            "frequencies", frequencies.half().float()
        )  # exact in fp16, where the file keeps them
        self.time_embed = nn.Sequential(
            nn.Linear(64, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.context_embed = nn.Sequential(nn.LayerNorm(context), nn.Linear(context, embedding))
        pixels = 3 * UNSHUFFLE**2
        width, skips = channels[0], [channels[0]]

        def block(inputs, level):
            layers = [ResBlock(inputs, channels[level], embedding)]
            return layers + (
                [SpatialTransformer(channels[level], context)] if attention[level] else []
            )

        self.input_blocks = nn.ModuleList(
            [TimestepEmbedSequential(nn.Conv2d(pixels, width, 3, padding=1))]
        )
        for level, count in enumerate(blocks):
            for _ in range(count):
                self.input_blocks.append(TimestepEmbedSequential(*block(width, level)))
                width = channels[level]
                skips.append(width)
            if level + 1 < len(channels):
                self.input_blocks.append(TimestepEmbedSequential(Downsample(width)))
                skips.append(width)
        self.middle_block = TimestepEmbedSequential(
            ResBlock(width, width, embedding),
            SpatialTransformer(width, context),
            ResBlock(width, width, embedding),
        )
        self.output_blocks = nn.ModuleList()
        for level in reversed(range(len(channels))):
            for i in range(blocks[level] + 1):
                layers = block(width + skips.pop(), level)
                width = channels[level]
                if level > 0 and i == blocks[level]:
                    layers.append(Upsample(width))
                self.output_blocks.append(TimestepEmbedSequential(*layers))
        self.out = nn.Sequential(
            nn.GroupNorm(8, width), nn.SiLU(), zeroed(nn.Conv2d(width, pixels, 3, padding=1))
        )

    def embed(self, timesteps, context):
        angles = timesteps.float()[:, None] * self.frequencies.float()
        waves = torch.cat([angles.sin(), angles.cos()], 1)
        return self.time_embed(waves.type_as(context)) + self.context_embed(context.mean(1))

    def forward(self, x, timesteps, context):
        weight = self.input_blocks[0][0].weight
        context = context.type_as(weight)
        emb = self.embed(timesteps, context)
        h, skips = F.pixel_unshuffle(x.type_as(weight), UNSHUFFLE), []
        for block in self.input_blocks:
            h = block(h, emb, context)
            skips.append(h)
        h = self.middle_block(h, emb, context)
        for block in self.output_blocks:
            h = block(torch.cat([h, skips.pop()], 1), emb, context)
        return F.pixel_shuffle(self.out(h), UNSHUFFLE).type_as(x)
