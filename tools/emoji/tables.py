"""The Markdown tables of what quality.py measured."""

import re

import torch

from variants import BASES, TABLES


def jackknife(statistic, *rows):
    """A function of the rows' distances, each the mean over the noise sets, and its standard error:
    the jackknife over the parts of every set."""
    whole, without = (
        [torch.tensor(row[key], dtype=torch.double) for row in rows] for key in ("fd", "fd_without")
    )
    sets, variance = len(whole[0]), 0
    for number in range(sets):
        values = statistic(
            *(
                all_sets.mean() + (parts[number] - all_sets[number]) / sets
                for all_sets, parts in zip(whole, without, strict=True)
            )
        )
        variance += (len(values) - 1) * values.var(correction=0).item()
    return statistic(*(all_sets.mean() for all_sets in whole)).item(), variance**0.5


def difference(row, other):
    return jackknife(lambda one, two: one - two, row, other)


def number(pair, digits, sign=""):
    mean, error = pair
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


class Row:
    """A row with its neighbours: the others of its base."""

    def __init__(self, name, row, others):
        self.name, self.row, self.others = name, row, others

    def against(self, name):
        """The difference to the row of that name."""
        other = self.others.get(name)
        if not other or name == self.name:
            return ""
        return number(difference(self.row, other), 3, "+")

    def fd(self):
        return number(jackknife(lambda fd: fd, self.row), 2)

    def change(self):
        return self.against("none")

    def minus_sag(self):
        return "" if self.name == "none" else self.against("SAG")

    def minus_equal(self):
        """Against plain steps, as many as cost the same."""
        if self.name.startswith("none"):
            return ""
        for name, other in self.others.items():
            if name.startswith("none") and other["unet_rows"] == self.row["unet_rows"]:
                return self.against(name)
        return ""

    def kept(self):
        """How much of SAG's change, where that is more than three errors."""
        none, sag = self.others.get("none"), self.others.get("SAG")
        if not none or not sag or self.name in ("none", "SAG"):
            return ""
        change, error = difference(sag, none)
        if abs(change) <= 3 * error:
            return ""
        mean, error = jackknife(
            lambda row, no, exact: (row - no) / (exact - no), self.row, none, sag
        )
        return f"{mean:.0%} ± {error:.0%}".replace("%", " %")

    def top1(self):
        if not self.row["top1"]:
            return ""
        mean, count = sum(self.row["top1"]) / len(self.row["top1"]), self.row["pictures"]
        return number((mean, (mean * (1 - mean) / count) ** 0.5), 3)

    def price(self):
        return f"{self.row['unet_rows']:.0f}"


COLUMNS = {
    "guidances": {"minus equal cost": Row.minus_equal},
    "cheaper SAG": {"minus SAG": Row.minus_sag, "kept": Row.kept},
    "controls": {"minus SAG": Row.minus_sag, "kept": Row.kept},
}


def caption(found, settings, facts):
    dates, devices = (
        " and ".join(sorted({row[key] for row in found})) for key in ("date", "device")
    )
    return (
        f"Measured {dates} on {devices}: {settings['sets']} noise sets of {settings['pictures']} "
        f"pictures, Euler, {settings['steps']} steps, SAG's scale {settings['scale']:g}, ± one "
        f"standard error. The judge names {facts['judge_top1_on_real_glyphs']:.1%} of the real "
        f"glyphs. Real pictures measured in the same way have FD "
        f"{number(facts['floors']['named'], 2)} where each is named, as in the rows with cfg, and "
        f"{number(facts['floors']['at_random'], 2)} where glyphs come at random, as in the "
        "unconditional rows."
    )


def table(title, results):
    """Empty if it has no row of its own."""
    columns = {
        "FD": Row.fd,
        "change": Row.change,
        **COLUMNS[title],
        "top-1": Row.top1,
        "UNet rows a picture": Row.price,
    }
    found, lines = [], []
    for base in BASES:
        others = results.of_base(base)
        names = [name for name in TABLES[title] if name in others]
        # "none" and "SAG" are in several tables.
        if not set(names) - {"none", "SAG"}:
            continue
        for name in names:
            found.append(others[name])
            row = Row(name, others[name], others)
            cells = [f"{base}, {name}", *(of_row(row) for of_row in columns.values())]
            lines.append("| " + " | ".join(cells) + " |")
    if not found:
        return ""
    head = ["| " + " | ".join(["row", *columns]) + " |", "|---" * (1 + len(columns)) + "|"]
    return "\n".join([caption(found, results.settings, results.facts), "", *head, *lines])


def all_tables(results):
    """By title."""
    made = {title: table(title, results) for title in TABLES}
    return {title: text for title, text in made.items() if text}


def insert(title, text, document):
    """Puts a table between its two lines of a document. A document without them stays as it is."""
    first, last = f"<!-- measured: {title} -->", f"<!-- end of measured: {title} -->"
    between = re.compile(re.escape(first) + ".*" + re.escape(last), re.S)
    document.write_text(between.sub(lambda _: f"{first}\n{text}\n{last}", document.read_text()))
