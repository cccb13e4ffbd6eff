#!/usr/bin/env python3
"""Measures what SAG, its cheaper forms and its controls do to the pictures of models/emoji, and
prints a Markdown table.

sag-sample draws every picture; this program only judges them. In a noise set all rows share noise
and names, so their differences are paired. It needs what tools/emoji/requirements.txt names. The
glyphs and the judge are made if they do not exist. Finished rows stay in --work, and a second call
continues from there.

    tools/emoji/quality.py --minutes 9 --doc docs/quality.md    # on a GPU
    tools/emoji/quality.py --smoke                              # a try on a CPU, in a minute or two
"""

import argparse
import concurrent.futures
import datetime
import hashlib
import json
import pathlib
import re
import subprocess
import sys
import time

import torch

import judge as judging
from gallery import Gallery, distance, gaussian

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
# The table goes between these two lines of a document.
MARKS = "<!-- measured -->", "<!-- end of measured -->"

# A noise set is cut into so many parts for the standard errors.
PARTS = 20
BASES = ("unconditional", "cfg 1", "cfg 2")
# What one call of the command draws, the most telling call first. Pictures without words do not
# depend on --cfg, so they need no call of their own.
CALLS = (("2", ("unconditional", "cfg 2")), ("1", ("cfg 1",)))


def variants(scale):
    """The command's arguments for each row of a base."""
    sag, twice = ["--sag-scale", f"{scale:g}"], ["--sag-scale", f"{2 * scale:g}"]
    return {
        "none": ["--no-sag"],
        "exact": sag,
        "interval 2, twice the scale": [*twice, "--sag-interval", "2"],
        "one pass": [*sag, "--sag-one-pass"],
        "window 0.3 ≤ σ ≤ 5": [*sag, "--sag-start", "5", "--sag-end", "0.3"],
        "one pass, interval 2, twice the scale": [*twice, "--sag-one-pass", "--sag-interval", "2"],
        "control: mask everywhere": [*sag, "--sag-threshold", "-1"],
        "control: random mask": [*sag, "--sag-shuffle"],
        "control: negative scale": ["--sag-scale", f"{-scale:g}"],
    }


class Rows:
    """The finished rows, one file each. A row counts if it was measured with the same settings."""

    def __init__(self, folder, settings):
        self.folder, self.settings = folder, settings

    def path(self, base, variant):
        return self.folder / (re.sub(r"[^a-z0-9]+", "-", f"{base} {variant}".lower()) + ".json")

    def find(self, base, variant):
        path = self.path(base, variant)
        row = json.loads(path.read_text()) if path.exists() else {}
        return row if row.get("settings") == self.settings else None

    def keep(self, base, variant, row):
        path = self.path(base, variant)
        part = path.with_suffix(".part")
        part.write_text(json.dumps({"settings": self.settings, **row}, indent=1) + "\n")
        part.rename(path)


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def settings_of(options):
    return {
        name: getattr(options, name)
        for name in ("sets", "pictures", "steps", "scale", "real", "seed", "limit")
    } | {
        "unet": digest(options.model / "unet.ts"),
        "judge": digest(options.judge),
        "glyphs": digest(options.glyphs),
    }


def make_judge(options):
    """Makes the glyphs and the judge if they do not exist."""
    tools = pathlib.Path(__file__).parent
    short = ["--limit", options.limit, "--steps", 40, "--batch", 32] if options.smoke else []
    for path, command in (
        (options.glyphs, ["render.py", "--font", options.font]),
        (options.judge, ["judge.py", "--glyphs", options.glyphs, *short]),
    ):
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [sys.executable, *map(str, [tools / command[0], *command[1:], "--out", path])],
                check=True,
                stdout=sys.stderr,
            )


class Sampler:
    """sag-sample on all noise sets at once."""

    def __init__(self, options, gallery):
        self.options = options
        sets = [gallery.noise_set(number) for number in range(options.sets)]
        self.glyphs, self.noise = zip(*sets, strict=True)
        self.names = [
            gallery.glyphs.captions[glyph][0] for glyphs in self.glyphs for glyph in glyphs.tolist()
        ]
        self.files = {}

    def noise_file(self, copies):
        if copies not in self.files:
            self.files[copies] = self.options.work / f"noise-{copies}.pt"
            torch.save(
                torch.cat([noise.cpu() for noise in self.noise] * copies), self.files[copies]
            )
        return self.files[copies]

    def draw(self, arguments, cfg, bases, number):
        """The pictures of each base, and the command's report. An empty prompt draws without
        words."""
        options = self.options
        prompts = [
            f"--prompt={'' if base == 'unconditional' else name}"
            for base in bases
            for name in self.names
        ]
        files = [options.work / f"pictures-{number % 2}.pt", options.work / "report.json"]
        command = [
            options.sag_sample,
            "--model",
            options.model,
            "--noise",
            self.noise_file(len(bases)),
            "--cfg",
            cfg,
            "--sampler",
            "euler",
            "--schedule",
            "karras",
            "--steps",
            options.steps,
            "--max-rows",
            options.max_rows,
            "--no-cuda-graph",
            "--quiet",
            "--save-latent",
            files[0],
            "--json",
            files[1],
        ]
        if subprocess.run([*map(str, command), *arguments, *prompts]).returncode:
            sys.exit(f"{options.sag_sample} failed with {' '.join(arguments)}")
        return files[0], json.loads(files[1].read_text())


def costs(run, pictures):
    """UNet rows a picture, and the share that was blurred. scripts/bench.sh measures time."""
    masked = [step["masked"] for step in run["steps"] if step["masked"] is not None]
    return {
        "unet_rows": run["rows"] / pictures,
        "masked": sum(masked) / len(masked) if masked else None,
    }


def device_name():
    return f"one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "a CPU"


class Judgement:
    """Turns pictures into rows, while the next ones are sampled."""

    def __init__(self, gallery, sampler, rows):
        self.gallery, self.sampler, self.rows = gallery, sampler, rows
        self.real = gaussian(gallery.real.cpu())

    def distances(self, features):
        """The distance of a noise set, and of the set without each of its parts."""
        part = torch.arange(len(features)) % min(PARTS, len(features))
        kept = [part != number for number in range(int(part.max()) + 1)]
        whole, *without = [
            distance(gaussian(features[keep]), self.real) for keep in [part >= 0, *kept]
        ]
        return whole, without

    def judge(self, base, pictures):
        result = {"fd": [], "fd_without": [], "top1": None if base == "unconditional" else []}
        sets = self.sampler.glyphs
        for glyphs, of_set in zip(sets, pictures.chunk(len(sets)), strict=True):
            features, named = judging.look(self.gallery.judge, of_set.to(glyphs.device))
            whole, without = self.distances(features.cpu())
            result["fd"].append(whole)
            result["fd_without"].append(without)
            if base != "unconditional":
                result["top1"].append((named == glyphs).float().mean().item())
        return result

    @torch.no_grad()
    def __call__(self, variant, bases, file, command_report):
        pictures = torch.load(file, weights_only=True).chunk(len(bases))
        for place, base in enumerate(bases):
            run = next(
                run
                for run in command_report["runs"]
                if run["pictures"][0] == place * len(pictures[0])
            )
            row = {
                "date": datetime.date.today().isoformat(),
                "device": device_name(),
                **self.judge(base, pictures[place]),
                **costs(run, len(pictures[0])),
            }
            self.rows.keep(base, variant, row)
            print(
                f"{base}, {variant}: FD {sum(row['fd']) / len(row['fd']):.3f}",
                file=sys.stderr,
                flush=True,
            )


def measure(options, sampler, judgement, rows):
    """Measures the rows that --rows asks for and that are not finished, until --minutes are
    over."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        judged = []
        for variant, arguments in variants(options.scale).items():
            for cfg, of_call in CALLS:
                bases = [
                    base
                    for base in of_call
                    if re.search(options.rows, f"{base}, {variant}")
                    and not rows.find(base, variant)
                ]
                if not bases or time.time() - options.started > 60 * options.minutes:
                    continue
                drawn = sampler.draw(arguments, cfg, bases, len(judged))
                for earlier in judged[-1:]:
                    # Its file is the next one to be overwritten.
                    earlier.result()
                judged.append(pool.submit(judgement, variant, bases, *drawn))
        for last in judged[-1:]:
            last.result()


def spread(row, other=None):
    """The mean over the sets, of a row or of its difference from another one, and the standard
    error: the jackknife over the parts of every set."""
    whole, without = (torch.tensor(row[key], dtype=torch.double) for key in ("fd", "fd_without"))
    if other:
        whole, without = (
            value - torch.tensor(other[key], dtype=torch.double)
            for value, key in ((whole, "fd"), (without, "fd_without"))
        )
    variances = (without.shape[1] - 1) * without.var(1, correction=0)
    return whole.mean().item(), variances.sum().sqrt().item() / len(whole)


def number(pair, digits, sign=""):
    mean, error = pair
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def insert(table, document):
    between = re.compile(re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1]), re.S)
    document.write_text(
        between.sub(lambda _: f"{MARKS[0]}\n{table}\n{MARKS[1]}", document.read_text())
    )


def line(base, variant, row, none, exact):
    def against(other, itself):
        return number(spread(row, other), 3, "+") if other and variant not in itself else ""

    top1 = ""
    if row["top1"]:
        mean, count = (
            sum(row["top1"]) / len(row["top1"]),
            row["settings"]["sets"] * row["settings"]["pictures"],
        )
        top1 = number((mean, (mean * (1 - mean) / count) ** 0.5), 3)
    cells = [
        f"{base}, {variant}",
        number(spread(row), 2),
        against(none, ("none",)),
        against(exact, ("none", "exact")),
        top1,
        f"{row['unet_rows']:.0f}",
    ]
    return "| " + " | ".join(cells) + " |"


def table(options, rows, facts):
    found = [
        (base, variant, row)
        for base in BASES
        for variant in variants(options.scale)
        if (row := rows.find(base, variant))
    ]
    dates, devices = (
        " and ".join(sorted({row[key] for _, _, row in found})) for key in ("date", "device")
    )
    lines = [
        f"Measured {dates} on {devices}: {options.sets} noise sets of {options.pictures} pictures, "
        f"Euler, {options.steps} steps, scale {options.scale:g}, ± one standard error. The judge "
        f"names {facts['judge_top1_on_real_glyphs']:.1%} of the real glyphs. Real pictures "
        f"measured in the same way have FD {number(facts['floors']['named'], 2)} where each is "
        f"named, as in the rows with cfg, and {number(facts['floors']['at_random'], 2)} where "
        "glyphs come at random, as in the unconditional rows.",
        "",
        "| row | FD | change | minus exact | top-1 | UNet rows a picture |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        line(base, variant, row, rows.find(base, "none"), rows.find(base, "exact"))
        for base, variant, row in found
    ]
    return "\n".join(lines)


def read_options():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sag-sample", type=pathlib.Path, default=ROOT / "build/release/command/sag-sample")
    add("--model", type=pathlib.Path, default=ROOT / "models/emoji")
    add("--glyphs", type=pathlib.Path, default=ROOT / "build/emoji/glyphs.npz")
    add("--judge", type=pathlib.Path, help="default: judge.pt next to the glyphs")
    add("--font", default="/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    add("--work", type=pathlib.Path, help="where finished rows stay (default: build/quality)")
    add("--doc", type=pathlib.Path, help="put the table between the marks of this document, too")
    add("--rows", default="", metavar="REGEX", help="only these, as in 'cfg 1|none'")
    add("--sets", type=int, default=3)
    add("--pictures", type=int, default=2000, help="in a noise set")
    add(
        "--minutes",
        type=float,
        default=float("inf"),
        help="begin no row after this time; 0: print what is there",
    )
    add("--steps", type=int, default=20)
    add("--scale", type=float, default=1.0)
    add("--real", type=int, default=20000, help="pictures that stand for the real distribution")
    add("--max-rows", type=int, default=1000)
    add("--seed", type=int, default=2, help="of the real pictures")
    add("--smoke", action="store_true", help="a few glyphs, pictures and steps")
    options = parser.parse_args()
    options.started, options.limit = time.time(), None
    if options.smoke:
        options.limit, options.sets, options.pictures, options.steps, options.real = (
            24,
            2,
            8,
            4,
            1000,
        )
    options.work = options.work or ROOT / (
        "build/quality-smoke" if options.smoke else "build/quality"
    )
    options.judge = options.judge or (
        options.work / "judge.pt" if options.smoke else options.glyphs.with_name("judge.pt")
    )
    return options


@torch.no_grad()
def main():
    options = read_options()
    options.work.mkdir(parents=True, exist_ok=True)
    make_judge(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gallery = Gallery(options, device)
    rows = Rows(options.work, settings_of(options))
    sampler = Sampler(options, gallery)
    measure(options, sampler, Judgement(gallery, sampler, rows), rows)
    text = table(options, rows, gallery.facts)
    print(text)
    if options.doc:
        insert(text, options.doc)


if __name__ == "__main__":
    main()
