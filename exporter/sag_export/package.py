"""Compiles a UNet into a package (.pt2, AOTInductor) that sag::AotiUNet reads.

The compiled code does not check its inputs, so the metadata of a package says what it takes:

    sag.format   "1"
    sag.device   "cpu" or "cuda"
    sag.torch    the version of PyTorch that compiled it
    sag.model    a fingerprint of the network, the same for all packages of a folder
    sag.skeleton the family of checkpoints whose skeleton it was compiled from, "sdxl" for example;
                 only for packages that run every checkpoint of the family
    sag.gpu      the compute capability it was compiled for, "9.0" for example; only for CUDA
    sag.inputs   a line for each input, in the order of forward: <name> <dtype> <dim> <dim> ...;
                 a dim is "77", or "1-8", or "8-128/8": multiples of 8. The first dim is the rows,
                 the same for all inputs
    sag.sites    a line for each marked attention: <its place among all attentions of a forward>
                 <dotted path>
    sag.cross_sites  the same for all cross-attentions, or nothing
    sag.weights  a line for each tensor that weights.pt must hold: <name> <dtype> <sizes> <strides>,
                 the last two with commas between the numbers; empty if the package has its weights

A package of a skeleton also has the record extra/names.json: what a checkpoint calls each weight.
"""

import hashlib
import os
import pathlib
import tempfile
import zipfile

import torch

from sag_export.attention import marked

# What a checkpoint calls each weight of a skeleton; the library reads it from archives, too.
NAMES = "extra/names.json"


def write_package(
    module,
    example,
    out,
    *,
    sites,
    dims,
    cross_sites=(),
    weights=None,
    skeleton=None,
    inductor_configs=None,
):
    """Compiles a module and writes the package, whole or not at all.

    module: in eval mode; its forward takes tensors. Convolutions keep the memory format of their
        weights.
    example: name -> tensor, in the order of forward. The names are those of UNetInput (x,
        timesteps, context, y), and the argument's name for other inputs. A dimension that may vary
        must be at least 2 here, and twice what it is a multiple of.
    out: the path of the package, *.pt2.
    sites: the dotted paths of the attentions that hooks may be set on.
    cross_sites: the dotted paths of all cross-attentions (attn2), if hooks may be set on them, too.
    dims: name -> what each dimension may be: a number, (low, high), or (low, high, multiple). The
        first dimension is the rows, the same for every input.
    weights: None puts them into the package. True leaves them out, for packages that share one
        weights.pt (write_weights) in the same folder.
    skeleton: the name of the family and the text of names.json, for a package that runs every
        checkpoint of the family. Leaves the weights out, too.
    inductor_configs: further options of AOTInductor, for example {"max_autotune": True}.

    Raises ValueError, in one sentence, if the module cannot be exported like this.
    """
    out = pathlib.Path(out)
    example = {name: tensor.contiguous() for name, tensor in example.items()}
    _check(module, example, out, dims, [*sites, *cross_sites])
    left_out = bool(weights or skeleton)
    with torch.no_grad():
        with marked(module, [*sites, *cross_sites]) as ordinals:
            program = _export(module, example, dims)
        metadata = _metadata(example, dims, ordinals, cross_sites)
        metadata["sag.model"] = _fingerprint(module, with_values=not skeleton)
        metadata["sag.weights"] = "\n".join(_describe_weights(module, program)) if left_out else ""
        if skeleton:
            metadata["sag.skeleton"], names = skeleton
        configs = {
            # As many threads as the program that runs it has, not the one that compiled it.
            "cpp.dynamic_threads": True,
            "aot_inductor.package_constants_in_so": not left_out,
            # Else it writes the values of vectors of up to eight elements into the code, such as
            # the bias of the last convolution.
            "always_keep_tensor_constants": left_out,
            **(inductor_configs or {}),
            "aot_inductor.metadata": metadata,
        }
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".sag-") as folder:
            whole = os.path.join(folder, out.name)
            torch._inductor.aoti_compile_and_package(
                program, package_path=whole, inductor_configs=configs
            )
            if skeleton:
                add_record(whole, NAMES, names)
            os.replace(whole, out)


def add_record(package, name, text):
    """Adds a file to a package."""
    with zipfile.ZipFile(package, "a") as archive:
        # Everything in it is in one folder.
        root = archive.namelist()[0].partition("/")[0]
        archive.writestr(f"{root}/{name}", text)


def write_weights(module, path):
    """Writes the parameters and buffers of a module for packages without weights: a plain dict, in
    the layouts that the tensors have."""
    path = pathlib.Path(path)
    tensors = {name: tensor.detach().cpu() for name, tensor in _tensors(module).items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".sag-") as folder:
        whole = os.path.join(folder, path.name)
        torch.save(tensors, whole)
        os.replace(whole, path)


def _tensors(module):
    return {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }


def _fingerprint(module, with_values):
    """Of the names, shapes and first values of all tensors: it differs for other weights of the
    same network. Without values it does not."""
    digest = hashlib.sha256()
    for name, tensor in sorted(_tensors(module).items()):
        first = tensor.detach().flatten()[:16].double().tolist() if with_values else []
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} {first}\n".encode())
    return digest.hexdigest()[:16]


def _check(module, example, out, dims, sites):
    if out.suffix != ".pt2":
        raise ValueError(f"a package's name must end with .pt2, got '{out}'")
    if any(part.training for part in module.modules()):
        raise ValueError("the module must be in eval mode: call eval() on it")
    if len({tensor.device for tensor in example.values()}) != 1:
        raise ValueError("the example's tensors must be on one device")
    if set(dims) != set(example):
        raise ValueError(f"dims must be given for {', '.join(example)}, got {', '.join(dims)}")
    if any(not path or path.split() != [path] for path in sites):
        raise ValueError(
            "an attention that is marked must be in a module with a name, without blanks in it"
        )
    if len({specs[0] for specs in dims.values()}) != 1:
        raise ValueError("the first dimension, the rows, must be the same for every input")
    for name, tensor in example.items():
        text = " ".join(_spec_text(spec) for spec in dims[name])
        if tensor.dim() != len(dims[name]) or not all(map(_fits, tensor.shape, dims[name])):
            raise ValueError(f"the example's {name} must be [{text}], got {list(tensor.shape)}")
        if any(
            not isinstance(spec, int) and size < 2 * bounds(spec)[2]
            for size, spec in zip(tensor.shape, dims[name], strict=True)
        ):
            raise ValueError(
                f"the example's {name} must be at least 2 where it may vary, and twice what it is "
                f"a multiple of, got {list(tensor.shape)}"
            )


def bounds(spec):
    """(low, high, multiple) of what a dimension may be."""
    return (spec, spec, 1) if isinstance(spec, int) else (*spec, 1)[:3]


def _fits(size, spec):
    low, high, multiple = bounds(spec)
    return low <= size <= high and size % multiple == 0


def _spec_text(spec):
    low, high, multiple = bounds(spec)
    return f"{low}" if low == high else f"{low}-{high}" + (f"/{multiple}" if multiple > 1 else "")


def _symbol(name, spec):
    low, high, multiple = bounds(spec)
    if low == high:
        return torch.export.Dim.STATIC
    if low % multiple or high % multiple:
        raise ValueError(
            f"the bounds of {name} must be multiples of {multiple}, got {low} and {high}"
        )
    symbol = torch.export.Dim(name, min=low // multiple, max=high // multiple)
    return multiple * symbol if multiple > 1 else symbol


def _export(module, example, dims):
    rows = _symbol("rows", next(iter(dims.values()))[0])
    shapes = tuple(
        {0: rows, **{i: _symbol(f"{name}_{i}", dims[name][i]) for i in range(1, len(dims[name]))}}
        for name in example
    )
    try:
        return torch.export.export(
            module, tuple(example.values()), dynamic_shapes=shapes, strict=False
        )
    except (
        torch._dynamo.exc.UserError,
        torch.fx.experimental.symbolic_shapes.GuardOnDataDependentSymNode,
    ) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"the module cannot be exported with these dims: {reason}") from error


def _metadata(example, dims, ordinals, cross_sites):
    device = next(iter(example.values())).device
    marked_paths = sorted(ordinals.items(), key=lambda site: site[1])

    def lines(wanted):
        return "\n".join(f"{ordinal} {path}" for path, ordinal in marked_paths if wanted(path))

    metadata = {
        "sag.format": "1",
        "sag.device": device.type,
        "sag.torch": torch.__version__.partition("+")[0],
        "sag.inputs": "\n".join(
            " ".join([name, _dtype_name(tensor.dtype), *map(_spec_text, dims[name])])
            for name, tensor in example.items()
        ),
        "sag.sites": lines(lambda path: path not in cross_sites),
        "sag.cross_sites": lines(lambda path: path in cross_sites),
    }
    if device.type == "cuda":
        metadata["sag.gpu"] = "{}.{}".format(*torch.cuda.get_device_capability(device))
    return metadata


def _dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def _describe_weights(module, program):
    own = _tensors(module)
    for name in (*program.state_dict, *program.constants):
        if name not in own:
            raise ValueError(
                f"weights can be left out if all are parameters or buffers, but '{name}' is neither"
            )
        tensor = own[name]
        sizes, strides = (
            ",".join(map(str, numbers)) for numbers in (tensor.shape, tensor.stride())
        )
        yield f"{name} {_dtype_name(tensor.dtype)} {sizes} {strides}"
