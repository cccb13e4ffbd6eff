"""A part of a pipeline with the weights of its files, and nothing else in it.

from_pretrained lets a tensor that no file holds lie as it was in memory, and says so in a log that
nobody reads. Here the names, shapes and kinds of all tensors must fit, and every weight is NaN
until it is read."""

import inspect
import pathlib
import pickle
import zipfile

import torch
from torch.overrides import TorchFunctionMode

from sag_export.mistake import Mistake
from sag_export.network import first_line
from sag_export.no_source import LORA_NAMES
from sag_export.weight_files import read_json, weight_files

# What a whole CLIP has beside its text model.
CLIP_REST = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
# Parts of names that a LoRA leaves in a model.
LORA = (*LORA_NAMES, ".base_layer.", ".processor.")
WRAPPERS = ("_orig_mod.", "module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def load_part(kind, folder, dtype, options, **config_options):
    """`kind`: a class of diffusers or transformers. Returns its module in `dtype`, for inference.

    config_options: for the configuration of transformers' models."""
    folder = pathlib.Path(folder)
    library = kind.__module__.partition(".")[0]
    check_config(kind, folder, library, options.note)
    files = weight_files(folder, library, options.variant, options.note)
    try:
        module = build(kind, folder, library, config_options).to(dtype)
    # A wrong configuration may raise anything.
    except Exception as error:
        raise Mistake(
            f'"{folder}" cannot be read as a {kind.__name__}: {first_line(error)}'
        ) from error
    fill(module, read(files), folder, options.note)
    return module.eval().requires_grad_(False)


def check_config(kind, folder, library, note):
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        raise Mistake(
            f'"{folder}" holds quantized weights ("quantization_config" in its config.json): '
            "export the model that they were made from."
        )
    if library != "diffusers":
        return
    known = inspect.signature(kind.__init__).parameters
    unknown = [key for key in config if key not in known and not key.startswith("_")]
    if unknown:
        note(
            f'"{folder.name}/config.json" has {len(unknown)} keys that the installed diffusers '
            f"does not know and leaves out: {', '.join(unknown)}"
        )


class _WithoutRandom(TorchFunctionMode):
    """Leaves out the random values of new weights, which take longer than to read the right
    ones."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        drawn = func in (torch.Tensor.normal_, torch.Tensor.uniform_)
        if drawn or getattr(func, "__module__", None) == "torch.nn.init":
            return (*args, *kwargs.values())[0]
        return func(*args, **kwargs)


def build(kind, folder, library, config_options):
    """The module of a configuration, its weights undefined. It is made as from_pretrained makes
    it: only so the buffers that no file holds are right."""
    if library == "diffusers":
        config = kind.load_config(folder, local_files_only=True)
        with _WithoutRandom():
            return kind.from_config(config)
    config = kind.config_class.from_pretrained(folder, local_files_only=True, **config_options)
    with _WithoutRandom():
        return kind(config)


def read(weights):
    """Name → tensor, out of all files."""
    state = {}
    for path, promised in weights.files.items():
        tensors = read_file(path, weights.format)
        if promised is not None and promised != set(tensors):
            stranger = min(promised ^ set(tensors))
            has = "says" if stranger in promised else "does not say"
            raise Mistake(
                f'"{weights.path}" does not belong to "{path.name}": it {has} that "{stranger}" is '
                f"in there, as {len(promised ^ set(tensors))} tensors differ. Download or save the "
                "weights again."
            )
        state.update(tensors)
    return state


def read_file(path, suffix):
    check_is_weights(path)
    try:
        return read_safetensors(path) if suffix == "safetensors" else read_pickle(path)
    except Mistake:
        raise
    except pickle.UnpicklingError as error:
        raise Mistake(
            f'"{path}" is damaged, or holds more than tensors, which may run code when it is '
            "opened: save it as safetensors."
        ) from error
    # A damaged file may raise anything.
    except Exception as error:
        raise Mistake(
            f'"{path}" cannot be read: {first_line(error)}. If it was cut short, download it again.'
        ) from error


def check_is_weights(path):
    """Names what often lies in the place of weights."""
    with open(path, "rb") as file:
        start = file.read(100)
    if not start:
        raise Mistake(f'"{path}" is empty: download it again.')
    if start.startswith(b"version https://git-lfs"):
        raise Mistake(
            f'"{path}" is only Git LFS\'s pointer to the weights: "git lfs pull" in its folder '
            "fetches them."
        )
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise Mistake(f'"{path}" is a web page and not weights: download it again.')


def read_safetensors(path):
    from safetensors import safe_open

    with safe_open(path, framework="pt", device="cpu") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        # save_model writes weights that are shared once, and says under which names.
        for name, kept in (file.metadata() or {}).items():
            if kept in tensors:
                tensors.setdefault(name, tensors[kept])
    return tensors


def read_pickle(path):
    mapped = zipfile.is_zipfile(path)
    tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, torch.Tensor)
        for name, tensor in tensors.items()
    ):
        what = ", ".join(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise Mistake(
            f'"{path}" must hold a dict of tensors by name, as state_dict() gives it, got '
            f"{what[:80]}."
        )
    return dict(tensors)


@torch.no_grad()
def fill(module, state, folder, note):
    """Copies the tensors of `state` into the module. Throws Mistake unless they fit, all of them
    and nothing else."""
    own = module.state_dict(keep_vars=True)
    state = without_prefix(state, own, folder, note)
    # Attention of the first diffusers had other names.
    if hasattr(module, "_fix_state_dict_keys_on_load"):
        module._fix_state_dict_keys_on_load(state)
    check_fits(module, own, state, folder)
    for name, tensor in own.items():
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        tensor.copy_(state[name])
    for name, tensor in own.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise Mistake(not_finite(name, state[name], tensor.dtype, folder))


def not_finite(name, tensor, dtype, folder):
    if tensor.float().isfinite().all():
        return (
            f'"{name}" of "{folder}" goes up to {tensor.abs().max():.3g}, which is more than '
            f"{str(dtype).removeprefix('torch.')} holds; try --dtype bf16 or fp32."
        )
    return f'"{name}" of "{folder}" holds NaN or infinity: these weights are broken.'


def without_prefix(state, own, folder, note):
    """Takes off what torch.compile, DataParallel and others put before every name."""
    known = {name.partition(".")[0] for name in own}
    prefix = ""
    while state:
        heads = {name.partition(".")[0] for name in state}
        if len(heads) > 1 or heads & known or not all("." in name for name in state):
            break
        prefix += f"{heads.pop()}."
        state = {name.partition(".")[2]: tensor for name, tensor in state.items()}
    if prefix:
        note(f'"{folder.name}": every tensor\'s name begins with {prefix}, which is taken off')
    return state


def check_fits(module, own, state, folder):
    leftover = [name for name in state if name not in own and not harmless(name, module)]
    both = [name for name in own if name in state]
    shapes = [
        f"{name} is {list(state[name].shape)} and not {list(own[name].shape)}"
        for name in both
        if state[name].shape != own[name].shape
    ]
    kinds = [
        f"{name} is {str(state[name].dtype).removeprefix('torch.')}"
        for name in both
        if kind_of(state[name]) != kind_of(own[name])
    ]
    problems = [
        (f"{len(names)} {'tensors' if names[1:] else 'tensor'} {what} ({some(names)})")
        for what, names in (
            ("missing", [name for name in own if name not in state]),
            ("that it has no use for", leftover),
            ("of another shape", shapes),
            ("of a wrong type", kinds),
        )
        if names
    ]
    if problems:
        raise Mistake(
            f'"{folder}" does not fit the {type(module).__name__} of its config.json: '
            f"{'; '.join(problems)}. {way_out(leftover)}"
        )


def harmless(name, module):
    """Whether a tensor may be left over: a buffer that the module makes itself, which older
    versions saved (position_ids), or the rest of a whole CLIP."""
    if name in dict(module.named_buffers()):
        return True
    return type(module).__name__ == "CLIPTextModel" and name.startswith(CLIP_REST)


def kind_of(tensor):
    return tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool


def some(names):
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def way_out(leftover):
    if any(part in name for name in leftover for part in LORA):
        return (
            "They look like a LoRA that was not merged: call fuse_lora() and "
            "unload_lora_weights() on the pipeline, and save it again."
        )
    if any(part in name for name in leftover for part in WRAPPERS):
        return (
            "They look like those of a wrapped module (torch.compile, DataParallel, FSDP): save "
            "the state_dict() of the module inside."
        )
    return "The weights and config.json must be of one model, and whole."


def check_module(spec, module):
    """Throws Mistake if a module of the user's has weights that nothing filled."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if torch.nn.parameter.is_lazy(tensor):
            raise Mistake(f'{spec}: "{name}" has no shape yet: call the module once before.')
        if tensor.is_meta:
            raise Mistake(f'{spec}: "{name}" has no values (it is on the meta device): load them.')
        if tensor.is_floating_point() and tensor.isnan().any():
            raise Mistake(f'{spec}: "{name}" holds NaN: it was not loaded, or is broken.')
