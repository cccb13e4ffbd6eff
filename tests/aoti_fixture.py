"""Writes the packages that aoti_unet_test.cpp and ops_library_test.py read.

    python aoti_fixture.py <folder>

Every package costs some ten seconds of g++, so only a few are compiled; others are copies with
edited metadata. With a GPU it also writes cuda/.
"""

import json
import pathlib
import shutil
import sys
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

from sag_export.attention import cross_attentions, self_attentions
from sag_export.package import add_record, write_package, write_weights

WIDTH, HEADS, CONTEXT, FEATURES = 16, 2, 6, 5
ROWS = (1, 4)
SIDE = (6, 24, 2)


class Attention(nn.Module):
    def __init__(self, context):
        super().__init__()
        self.to_q = nn.Linear(WIDTH, WIDTH, bias=False)
        self.to_k = nn.Linear(context, WIDTH, bias=False)
        self.to_v = nn.Linear(context, WIDTH, bias=False)
        self.to_out = nn.Linear(WIDTH, WIDTH)

    def forward(self, t, context):
        q, k, v = (
            part.unflatten(2, (HEADS, -1)).transpose(1, 2)
            for part in (self.to_q(t), self.to_k(context), self.to_v(context))
        )
        return self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.attn1, self.attn2 = Attention(WIDTH), Attention(CONTEXT)

    def forward(self, t, context):
        own = self.norm(t)
        t = t + self.attn1(own, own)
        return t + self.attn2(t, context)


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.transformer_blocks = nn.ModuleList([Block()])

    def forward(self, h, context):
        t = h.flatten(2).transpose(1, 2)
        for block in self.transformer_blocks:
            t = block(t, context)
        return t.transpose(1, 2).reshape(h.shape)


class UNet(nn.Module):
    """A small UNet with LDM's names: one self-attention at input.1.0 and one at middle.0.0, both at
    half the size."""

    def __init__(self):
        super().__init__()
        convolution = nn.Conv2d(4, WIDTH, 3, padding=1)
        down = nn.Conv2d(WIDTH, WIDTH, 3, stride=2, padding=1)
        self.input_blocks = nn.ModuleList([convolution, nn.ModuleList([down, Transformer()])])
        self.middle_block = nn.ModuleList([nn.GroupNorm(4, WIDTH), Transformer()])
        self.time_embed = nn.Linear(WIDTH, WIDTH)
        self.label_emb = nn.Linear(FEATURES, WIDTH)
        self.out = nn.Conv2d(WIDTH, 4, 3, padding=1)
        self.register_buffer("frequencies", torch.exp(-torch.arange(WIDTH) / 2), persistent=False)

    def forward(self, x, timesteps, context, y):
        waves = torch.sin(timesteps[:, None] * self.frequencies).to(x.dtype)
        embedding = self.time_embed(waves) + self.label_emb(y)
        wide = self.input_blocks[0](x) + embedding[:, :, None, None]
        down, transformer = self.input_blocks[1]
        h = transformer(down(wide), context)
        h = self.middle_block[1](self.middle_block[0](h), context)
        h = F.interpolate(h, scale_factor=2.0, mode="nearest")
        return self.out(wide + h)


class Plain(nn.Module):
    """No attention at all, and an input of a name of its own."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x, timesteps, strength):
        return self.conv(x) * (timesteps.to(x.dtype) * strength)[:, None, None, None]


def make_unet():
    torch.manual_seed(1)
    unet = UNet().eval().requires_grad_(False)
    for parameter in unet.parameters():
        # So that attention is not flat.
        parameter.mul_(1.5)
    return unet


def example(rows=2, height=12, width=16, device="cpu"):
    torch.manual_seed(2)
    inputs = {
        "x": torch.randn(rows, 4, height, width),
        "timesteps": torch.linspace(1, 900, rows),
        "context": torch.randn(rows, 3, CONTEXT),
        "y": torch.randn(rows, FEATURES),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def ranges():
    return {
        "x": [ROWS, 4, SIDE, SIDE],
        "timesteps": [ROWS],
        "context": [ROWS, 3, CONTEXT],
        "y": [ROWS, FEATURES],
    }


def sizes_of(inputs):
    return {name: list(tensor.shape) for name, tensor in inputs.items()}


def write_folder(folder, unet, device):
    """A package for ranges and one for 2 rows of 12 x 16, which share weights.pt."""
    folder.mkdir(parents=True)
    inputs = example(device=device)
    sites = [path for _, path in self_attentions(unet, tuple(inputs.values()))]
    write_package(unet, inputs, folder / "a_range.pt2", sites=sites, dims=ranges(), weights=True)
    write_package(
        unet, inputs, folder / "rows_2.pt2", sites=sites, dims=sizes_of(inputs), weights=True
    )
    write_weights(unet, folder / "weights.pt")


def write_cross(path, unet):
    """A package whose cross-attentions can be hooked, too, for contexts of one prompt or two."""
    inputs = example()
    inputs["context"] = torch.cat([inputs["context"]] * 2, 1)
    given = tuple(inputs.values())
    write_package(
        unet,
        inputs,
        path,
        sites=[path for _, path in self_attentions(unet, given)],
        cross_sites=cross_attentions(unet, given),
        dims={**ranges(), "context": [ROWS, (3, 6, 3), CONTEXT]},
    )


def write_plain(path):
    module = Plain().eval().to(torch.bfloat16)
    inputs = {
        "x": torch.randn(2, 4, 8, 8, dtype=torch.bfloat16),
        "timesteps": torch.ones(2),
        "strength": torch.ones(2, dtype=torch.bfloat16),
    }
    write_package(module, inputs, path, sites=[], dims=sizes_of(inputs))


def edited(source, target, **changes):
    """Copies a package with other metadata. A name has __ for every dot; None removes an entry."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if entry.filename.endswith("_metadata.json"):
                metadata = {
                    **json.loads(content),
                    **{key.replace("__", "."): value for key, value in changes.items()},
                }
                content = json.dumps(
                    {key: value for key, value in metadata.items() if value is not None}
                )
            new.writestr(entry.filename, content)


def write_skeleton(folder, packages):
    """The packages of a folder as those of a skeleton, without weights.pt."""
    folder.mkdir()
    for package in packages.glob("*.pt2"):
        edited(package, folder / package.name, sag__skeleton="toy")
        add_record(folder / package.name, "extra/names.json", "{}")


def write_foreign(folder, package, unet):
    """Files that are not what AotiUNet reads, or do not fit."""
    folder.mkdir()
    edited(
        package,
        folder / "bare.pt2",
        **{f"sag__{key}": None for key in ("format", "inputs", "sites", "torch")},
    )
    edited(package, folder / "format_2.pt2", sag__format="2")
    edited(package, folder / "torch_2_6.pt2", sag__torch="2.6.0")
    edited(package, folder / "cuda.pt2", sag__device="cuda", sag__gpu="9.0", AOTI_DEVICE_KEY="cuda")
    edited(package, folder / "ppc.pt2", AOTI_MACHINE="ppc64le")
    edited(package, folder / "no_inputs.pt2", sag__inputs=None)
    edited(
        package,
        folder / "odd_inputs.pt2",
        sag__inputs="x float32 1-4 4 six 6-24/0\ntimesteps float32 1-4",
    )
    edited(
        package, folder / "one_site.pt2", sag__sites="2 middle_block.1.transformer_blocks.0.attn1"
    )
    edited(package, folder / "odd_cross_sites.pt2", sag__cross_sites="1 middle_block.1.attn1")
    edited(package, folder / "other_model.pt2", sag__model="0123456789abcdef")
    whole = package.read_bytes()
    (folder / "truncated.pt2").write_bytes(whole[: len(whole) // 2])
    with zipfile.ZipFile(folder / "zip.pt2", "w") as archive:
        archive.writestr("hello.txt", "not a package")
    torch.save({"x": torch.ones(2)}, folder / "tensors.pt2")
    torch.export.save(
        torch.export.export(unet, tuple(example().values()), strict=False), folder / "exported.pt2"
    )


def write_other_weights(folder, unet):
    tensors = torch.load(folder / "weights.pt")
    name = "middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    variants = {
        "doubled": {**tensors, "out.weight": tensors["out.weight"] * 2},
        "heavy": {
            **tensors,
            name: torch.ones(1 << 24)[: WIDTH * WIDTH].view(WIDTH, WIDTH),
        },  # saved with its storage
        "lacking": {key: value for key, value in tensors.items() if key != name},
        "small": {**tensors, name: torch.ones(3, 3)},
        "half": {**tensors, name: tensors[name].half()},
        "turned": {**tensors, name: tensors[name].t()},
    }
    for variant, changed in variants.items():
        torch.save(changed, folder / f"{variant}.pt")
    torch.save([torch.ones(2)], folder / "list.pt")


def main():
    target = pathlib.Path(sys.argv[1])
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    unet, inputs = make_unet(), example()
    sites = [path for _, path in self_attentions(unet, tuple(inputs.values()))]
    with torch.no_grad():
        torch.jit.trace(unet, tuple(inputs.values()), check_trace=False).save(target / "unet.ts")
        torch.save({**inputs, "out": unet(*inputs.values())}, target / "call.pt")
    write_package(unet, inputs, target / "unet.pt2", sites=sites, dims=ranges())
    write_cross(target / "cross.pt2", unet)
    write_folder(target / "folder", unet, "cpu")
    write_other_weights(target / "folder", unet)
    write_skeleton(target / "skeleton", target / "folder")
    write_plain(target / "plain.pt2")
    write_foreign(target / "foreign", target / "unet.pt2", unet)
    if torch.cuda.is_available():
        write_folder(target / "cuda", make_unet().cuda(), "cuda")


if __name__ == "__main__":
    main()
