"""Names of attentions, the same as the library's: tests/golden/site_names.json holds both to
them."""

import re
import typing

from sag_export.mistake import Mistake

LDM = re.compile(
    r"(?:.*\.)?(?:(input|output)_blocks\.(\d+)|middle_block)\.1\.transformer_blocks\.(\d+)\.attn1"
)
DIFFUSERS = re.compile(r"(?:.*\.)?mid_block\.attentions\.0\.transformer_blocks\.(\d+)\.attn1")

# Parts of a path that say that a module belongs to the middle block.
MIDDLE_PARTS = {"mid", "middle", "middle_block", "mid_block", "mid_attn", "bottleneck"}


def short_name(path):
    """ComfyUI's name, for example "middle.0.0", or the path if there is none."""
    if found := LDM.fullmatch(path):
        block = f"{found[1]}.{found[2]}" if found[1] else "middle.0"
        return f"{block}.{found[3]}"
    found = DIFFUSERS.fullmatch(path)
    return f"middle.0.{found[1]}" if found else path


def middle_sites(sites):
    """The paths of the middle block's self-attentions, by the rule of sag's find_middle_attention:
    middle.0.0 if there is one, the only attention if there is one, or what its path says."""
    known = [path for _, path in sites if short_name(path) == "middle.0.0"]
    if known or len(sites) == 1:
        return known or [sites[0][1]]
    return [path for _, path in sites if MIDDLE_PARTS.intersection(path.split("."))]


def choose(wanted, sites):
    """The dotted paths of the sites that are wanted; the first one is to be watched.

    wanted: names, paths (also without the wrapper's prefix), "#ordinal" or "all". If it is empty,
        the middle block's site is chosen.
    sites: [(ordinal, path)]."""
    if not sites:
        raise Mistake(
            "No self-attention was found: no module that was given one tensor of tokens called "
            "scaled_dot_product_attention with as many keys as queries. "
            "(torch.nn.MultiheadAttention calls it with need_weights=False. A softmax between two "
            "products is found in a TorchScript file that you trace yourself: docs/models.md, "
            '"Files you already have".)'
        )
    middle = middle_sites(sites)
    if not wanted:
        if not middle:
            raise Mistake(
                "The network has no middle block: choose its attention with --site. "
                f"{listed(sites)}"
            )
        if len(middle) > 1:
            raise Mistake(
                f"The network has {len(middle)} self-attentions in its middle block: choose one "
                f"with --site. {listed(sites)}"
            )
        return middle
    paths = []
    for name in wanted:
        found = middle[:1] + [path for _, path in sites] if name == "all" else named(name, sites)
        paths += [path for path in dict.fromkeys(found) if path not in paths]
    return paths


class Marks(typing.NamedTuple):
    """What hooks can be set on in a compiled network: dotted paths."""

    sites: list
    # All cross-attentions, or none.
    cross_sites: list = ()


def unique_name(path, sites):
    """The short name if no other site has it, else the path; "#ordinal" of an attention that has no
    module of its own."""
    short = short_name(path)
    alone = len({other for _, other in sites if short_name(other) == short}) == 1
    return (short if alone else path) or "#" + str(
        next(ordinal for ordinal, other in sites if other == path)
    )


def named(name, sites):
    exact = {path for ordinal, path in sites if name in (path, short_name(path), f"#{ordinal}")}
    found = exact or {path for _, path in sites if path.endswith("." + name)}
    if len(found) != 1:
        several = f"{len(found)} of them" if found else "none of them"
        raise Mistake(
            f'--site must name one self-attention, but "{name}" names {several}. {listed(sites)}'
        )
    return list(found)


def listed(sites):
    return (
        "Its self-attentions are "
        + ", ".join(f"#{ordinal} {short_name(path)}" for ordinal, path in sites)
        + "."
    )
