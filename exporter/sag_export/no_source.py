"""What SOURCE is when it cannot be exported, and what to do then."""

import difflib
import json
import pathlib

LORA = (
    "is a LoRA, a change to a model: fuse it into its model in diffusers (load_lora_weights, "
    "fuse_lora, unload_lora_weights, save_pretrained) and export that folder"
)
ONE_FILE = (
    "is a checkpoint in one file: diffusers makes a folder of it that can be exported, "
    "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER), or with "
    "StableDiffusionXLPipeline (docs/models.md)"
)
# Parts of names that only LoRAs' tensors have.
LORA_NAMES = ("lora_", "_lora.", "lora.", "loha_", "lokr_", "hada_")


def names_in_safetensors(path):
    """Reads the header alone; anything else than a safetensors file has no names."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            return list(json.loads(file.read(min(size, 1 << 26))))
    except (OSError, ValueError):
        return []


def about_file(path):
    suffix = path.suffix.lower()
    if suffix == ".safetensors":
        names = names_in_safetensors(path)
        is_lora = any(part in name for name in names for part in LORA_NAMES)
        return LORA if is_lora else ONE_FILE
    if suffix in (".ckpt", ".pt", ".pth", ".bin"):
        return ONE_FILE
    if suffix in (".ts", ".pt2"):
        return "is exported already: sag-sample --unet takes it"
    if suffix in (".onnx", ".gguf"):
        return (
            f"is a model in {suffix[1:].upper()} form, which cannot be exported; give the folder "
            "that it was made of"
        )
    if suffix == ".py":
        return f"is a module: give it as {path.stem}:FACTORY, the function that makes the network"
    return "is a file"


def about_folder(folder):
    names = {entry.name for entry in folder.iterdir()}
    if names & {"adapter_config.json", "pytorch_lora_weights.safetensors"}:
        return LORA
    if "model.json" in names:
        return "is a model directory already: sag-sample --model takes it"
    inside = sorted(
        entry.name for entry in folder.iterdir() if (entry / "model_index.json").is_file()
    )
    if inside:
        return f'has a pipeline inside, in its folder "{inside[0]}": give that'
    return "has neither a model_index.json nor a config.json"


def nearest_folder(path):
    """A name beside the missing one that it may be a typo of."""
    try:
        names = [entry.name for entry in path.parent.iterdir()]
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None


def why_not(source):
    """One sentence about a SOURCE that is no folder of diffusers and no MODULE:FACTORY."""
    path = pathlib.Path(source)
    expected = (
        "SOURCE must be the folder of a diffusers pipeline (with model_index.json) or UNet (with "
        "config.json), or MODULE:FACTORY"
    )
    if path.is_dir():
        return f'{expected}, but "{path}" {about_folder(path)}.'
    if path.is_file():
        return f'{expected}, but "{path}" {about_file(path)}.'
    near = nearest_folder(path)
    hint = f'; do you mean "{near}"?' if near else "."
    if not near and source.count("/") == 1 and not source.startswith((".", "/")):
        hint = (
            "; a model of the Hugging Face hub must be downloaded first: "
            f"hf download {source} --local-dir FOLDER."
        )
    return f'{expected}, but there is no "{path}"{hint}'
