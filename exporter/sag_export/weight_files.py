"""Which files of a folder hold the weights, in every layout that diffusers and transformers have
written: a variant (fp16, ema, …) or none, safetensors or .bin, one file or shards with an index."""

import dataclasses
import json
import pathlib
import re

from sag_export.mistake import Mistake
from sag_export.network import first_line

# The names that each library looks for, the better format first.
NAMES = {
    "diffusers": (
        ("diffusion_pytorch_model", "safetensors"),
        ("diffusion_pytorch_model", "bin"),
    ),
    "transformers": (("model", "safetensors"), ("pytorch_model", "bin")),
}
SHARD = re.compile(r".*-\d{5}-of-\d{5}")


@dataclasses.dataclass
class Weights:
    """One way to read all weights."""

    # "" is none.
    variant: str
    format: str
    # The file, or the index of the shards.
    path: pathlib.Path
    # Path → the tensors that the index promises in it; of a single file: None.
    files: dict = dataclasses.field(default_factory=dict)

    def missing(self):
        return [path for path in self.files if not path.is_file()]


def read_json(path):
    path = pathlib.Path(path)
    if not path.is_file():
        link = " is a link to a file that" if path.is_symlink() else ""
        raise Mistake(f'"{path}"{link} is not there: download or save the folder again.')
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Mistake(
            f'"{path}" is not a JSON file that can be read: {first_line(error)}'
        ) from error
    if not isinstance(content, dict):
        raise Mistake(f'"{path}" must hold a JSON object.')
    return content


def find(folder, library):
    """Variant → all Weights of it, the better format first. Indices are not read yet."""
    folder = pathlib.Path(folder)
    if not folder.is_dir():
        raise Mistake(f'"{folder}" must be a folder with config.json and weights, but is none.')
    found = {}
    names = sorted(path.name for path in folder.iterdir())
    for stem, suffix in NAMES[library]:
        single = re.compile(rf"{stem}(?:\.([^.]+))?\.{suffix}")
        # An index has had its variant in three places.
        index = re.compile(
            rf"{stem}(?:\.([^.]+))?\.{suffix}(?:\.([^.]+))?\.index(?:\.([^.]+))?\.json"
        )
        for name in names:
            match = single.fullmatch(name) or index.fullmatch(name)
            variant = next(filter(None, match.groups()), "") if match else ""
            if match and not SHARD.fullmatch(variant):
                weights = Weights(variant, suffix, folder / name)
                found.setdefault(variant, []).append(weights)
    if not found:
        raise Mistake(
            f'"{folder}" has no weights: there is no {" or ".join(map(".".join, NAMES[library]))}, '
            f"alone, with a variant, or with an index.json of shards. {listed(names)}"
        )
    return found


def listed(names):
    if not names:
        return "The folder is empty."
    return f"It holds {', '.join(names[:8])}{', …' if len(names) > 8 else ''}."


def choose_variant(folder, found, wanted, note):
    """`wanted`: of --variant. Without it the plain files are meant, or the only variant."""
    if wanted in found:
        return wanted
    if "" in found or len(found) == 1:
        variant = "" if "" in found else next(iter(found))
        if wanted:
            instead = f"its variant {variant} is" if variant else "its plain weights are"
            note(f'"{folder.name}" has no variant {wanted}; {instead} read')
        return variant
    raise Mistake(
        f'"{folder}" has several variants of its weights and none without a name: '
        f"{', '.join(sorted(found))}; choose one with --variant."
    )


def with_files(weights):
    """Reads the index, if it is one."""
    if not weights.path.name.endswith(".json") or not weights.path.is_file():
        weights.files = {weights.path: None}
        return weights
    places = read_json(weights.path).get("weight_map")
    if not places or not isinstance(places, dict):
        raise Mistake(f'"{weights.path}" must have a "weight_map" that says where each tensor is.')
    for tensor, name in places.items():
        if not isinstance(name, str) or pathlib.PurePath(name).name != name or "\\" in name:
            raise Mistake(
                f'"{weights.path}" must name files of its own folder, but has {name!r} for '
                f'"{tensor}".'
            )
        weights.files.setdefault(weights.path.parent / name, set()).add(tensor)
    return weights


def choose_files(folder, several, note):
    """Of the Weights of one variant: those that are whole, in the better format."""
    several = [with_files(weights) for weights in several]
    whole = [weights for weights in several if not weights.missing()]
    best = [weights for weights in whole if weights.format == whole[0].format]
    if len(best) > 1:
        names = " and ".join(f'"{weights.path.name}"' for weights in best)
        raise Mistake(
            f'"{folder}" has its weights twice, in {names}, and nothing says which are meant: move '
            "one of them away."
        )
    for weights in several:
        missing = weights.missing()
        if missing and not best:
            raise Mistake(f"{absent(weights, missing)}: download or save the weights again.")
        if missing:
            note(f"{absent(weights, missing)}; {best[0].path.name} is read in its place")
    return best[0]


def absent(weights, missing):
    links = [path for path in missing if path.is_symlink()]
    if links:
        return f'"{links[0]}" is a link to a file that is not there'
    files = f'"{missing[0].name}"' + (f" and {len(missing) - 1} more files" if missing[1:] else "")
    return f'"{weights.path}" names {files}, but there is no such file'


def weight_files(folder, library, wanted, note):
    """The Weights to read. `wanted`: the variant of --variant, or None."""
    folder = pathlib.Path(folder)
    found = find(folder, library)
    return choose_files(folder, found[choose_variant(folder, found, wanted, note)], note)


def check_variant(folders, wanted):
    """Throws Mistake unless one of the folders has the variant of --variant. `folders`: [(folder,
    library)]."""
    if wanted is None:
        return
    found = {name for folder, library in folders for name in find(folder, library)}
    if wanted not in found:
        named = sorted(found - {""})
        raise Mistake(
            f"--variant {wanted}: the weights have "
            + (f"{', '.join(named)}, but no such variant." if named else "no variants.")
        )
