"""The rows that quality.py measures, in which order, and in which tables they stand."""

import dataclasses
import math

BASES = ("unconditional", "cfg 1", "cfg 2", "cfg 4")
WORDLESS = BASES[0]


@dataclasses.dataclass(frozen=True)
class Variant:
    """How sag-sample draws a row's pictures, and what that costs."""

    name: str
    arguments: tuple[str, ...]
    steps: int
    # In so many steps SAG evaluates its row.
    sag_steps: int = 0
    # Rows more in every step, of PAG and SEG.
    perturbed: int = 0

    def rows(self, base):
        """UNet rows a picture."""
        plain = 2 if base in ("cfg 2", "cfg 4") else 1
        # At cfg 1 SAG has the unconditional row evaluated, too.
        of_sag = 2 if base == "cfg 1" else 1
        return self.steps * (plain + self.perturbed) + self.sag_steps * of_sag


# Where a picture has no cfg or cfg 1, a row more a step is twice the cost; otherwise 1.5 times.
MORE_STEPS = {
    "1.15 times the steps": 1.15,
    "1.5 times the steps": 1.5,
    "twice the steps": 2,
    "three times the steps": 3,
    "four times the steps": 4,
}
TIMES = {2: "twice", 3: "three times", 4: "four times"}
# Of 20 Karras steps, all but the last two are above this.
LOWEST = 0.05


def guided(steps, interval=1):
    return math.ceil(steps / interval)


def sag_variants(steps, scale):
    def row(name, factor=1, options="", sag_steps=steps, arguments=()):
        text = f"sag:scale={factor * scale:g}{options}"
        return Variant(name, ("--guidance", text, *arguments), steps, sag_steps)

    yield row("SAG")
    yield row("SAG, twice the scale", 2)
    for before, options in (("SAG", ""), ("SAG, one pass", ",one_pass")):
        if options:
            yield row(before, 1, options)
        for interval, times in TIMES.items():
            name, every = (
                f"{before}, interval {interval}, {times} the scale",
                f",interval={interval}",
            )
            yield row(name, interval, every + options, guided(steps, interval))
        # The last guided step of interval 3 is one of the last two.
        name, end = f"{before}, interval 3, three times the scale, σ ≥ {LOWEST}", f"={LOWEST}"
        every = f",interval=3,sigma_end{end}"
        yield row(name, 3, every + options, guided(steps, 3) - 1)
    window = ",sigma_start=5,sigma_end=0.3"
    yield row("SAG, window 0.3 ≤ σ ≤ 5", 1, window, round(0.3 * steps))
    yield row("control: mask everywhere", 1, ",threshold=-1")
    yield row("control: random mask", arguments=("--sag-shuffle",))
    yield row("control: negative scale", -1)


def further_variants(steps, scale):
    for kind, options in (("pag", ""), ("seg", ",blur_sigma=10")):
        for strength in (1, 3):
            text = f"{kind}:scale={strength}{options}"
            name = f"{kind.upper()}, scale {strength}"
            yield Variant(name, ("--guidance", text), steps, perturbed=1)
    both = ("--guidance", f"sag:scale={scale:g}", "--guidance", "pag:scale=1")
    yield Variant("SAG and PAG, scale 1", both, steps, steps, 1)
    for name, text in (
        ("APG", "apg"),
        ("APG, only projected", "apg:norm_threshold=0,momentum=0"),
        ("CFG-Zero*", "cfg_zero"),
        ("CFG rescale 0.3", "rescale:multiplier=0.3"),
        ("CFG rescale 0.7", "rescale:multiplier=0.7"),
    ):
        yield Variant(name, ("--guidance", text), steps)


def all_variants(steps, scale):
    """By name. `scale` is SAG's."""
    none = ("--no-sag",)
    made = [Variant("none", none, steps)]
    made += [Variant(f"none, {name}", none, round(k * steps)) for name, k in MORE_STEPS.items()]
    made += [*sag_variants(steps, scale), *further_variants(steps, scale)]
    return {variant.name: variant for variant in made}


PERTURBING = (
    *("SAG", "PAG, scale 1", "PAG, scale 3", "SEG, scale 1", "SEG, scale 3"),
    "SAG and PAG, scale 1",
)
CFG_FORMS = ("APG", "APG, only projected", "CFG-Zero*", "CFG rescale 0.3", "CFG rescale 0.7")
CHEAPEST = (
    "SAG, one pass, interval 3, three times the scale",
    "SAG, interval 3, three times the scale",
    "SAG, one pass, interval 4, four times the scale",
    "SAG, interval 4, four times the scale",
    f"SAG, one pass, interval 3, three times the scale, σ ≥ {LOWEST}",
    f"SAG, interval 3, three times the scale, σ ≥ {LOWEST}",
)
CHEAPER = (
    "SAG, one pass",
    "SAG, interval 2, twice the scale",
    "SAG, one pass, interval 2, twice the scale",
    "SAG, window 0.3 ≤ σ ≤ 5",
)
CONTROLS = ("control: mask everywhere", "control: random mask", "control: negative scale")

# The most telling rows first.
PLAN = (
    ((WORDLESS, "cfg 2"), ("none", *PERTURBING)),
    # As many rows as with one or two guidances.
    ((WORDLESS, "cfg 2"), ("none, twice the steps",)),
    (("cfg 2",), ("none, 1.5 times the steps",)),
    ((WORDLESS,), ("none, three times the steps",)),
    (("cfg 1",), ("none", "SAG")),
    ((WORDLESS, "cfg 2", "cfg 1"), CHEAPEST),
    (("cfg 2",), ("none, 1.15 times the steps",)),
    (("cfg 4",), ("none",)),
    (("cfg 4", "cfg 2"), CFG_FORMS),
    (("cfg 4",), (*PERTURBING, "none, 1.5 times the steps", "none, twice the steps")),
    (("cfg 1",), PERTURBING[1:]),
    (("cfg 1",), ("none, twice the steps", "none, three times the steps")),
    ((WORDLESS, "cfg 2", "cfg 1", "cfg 4"), ("SAG, twice the scale",)),
    ((WORDLESS, "cfg 2", "cfg 1"), CHEAPER),
    (("cfg 1",), ("none, four times the steps",)),
    ((WORDLESS, "cfg 2", "cfg 1"), CONTROLS),
)

TABLES = {
    "guidances": (
        *("none", *(f"none, {name}" for name in MORE_STEPS), "SAG", "SAG, twice the scale"),
        *(*PERTURBING[1:], *CFG_FORMS),
    ),
    "cheaper SAG": ("none", "SAG", *CHEAPER, *sorted(CHEAPEST, key=len)),
    "controls": ("none", "SAG", *CONTROLS),
}


def planned_calls():
    """What one call of the command draws: a variant's name and bases. Pictures without words do not
    depend on --cfg, so they need no call of their own beside others."""
    for bases, names in PLAN:
        with_cfg = [(base,) for base in bases if base != WORDLESS]
        if WORDLESS in bases:
            with_cfg[:1] = [(WORDLESS, *(with_cfg[0] if with_cfg else ()))]
        for name in names:
            for of_call in with_cfg:
                yield name, of_call


def price_list(steps, scale, wanted, pictures):
    """A line for each row in its order: its name, its UNet rows a picture, and the millions of UNet
    rows so far."""
    variants, sum_of_rows = all_variants(steps, scale), 0
    for name, bases in planned_calls():
        for base in bases:
            if not wanted(base, name):
                continue
            rows = variants[name].rows(base)
            sum_of_rows += rows * pictures
            yield f"{sum_of_rows / 1e6:6.2f} M {rows:4d}  {base}, {name}"
