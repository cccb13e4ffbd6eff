#!/usr/bin/env python3
"""Measures what the guidances, cheaper forms of SAG and SAG's controls do to the pictures of
models/emoji, and prints Markdown tables.

sag-sample draws every picture; this program only judges them. In a noise set all rows share noise
and names, so their differences are paired. It needs what tools/emoji/requirements.txt names. The
glyphs and the judge are made if they do not exist. Finished rows stay in --results, and a second
call continues from there, with the same judge and glyphs.

    tools/emoji/quality.py --minutes 9 --doc docs/quality.md    # on a GPU
    tools/emoji/quality.py --list                               # the rows, in their order
    tools/emoji/quality.py --only-tables                        # of what is in --results
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
import threading
import time

import torch

import judge as judging
import tables
from gallery import Gallery, distance, gaussian
from variants import WORDLESS, all_variants, planned_calls, price_list

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent

# A noise set is cut into so many parts for the standard errors.
PARTS = 20


class Results:
    """The finished rows, in one file."""

    def __init__(self, path):
        self.path, self.lock = path, threading.Lock()
        held = json.loads(path.read_text()) if path.exists() else {}
        self.settings, self.facts = held.get("settings"), held.get("facts")
        self.rows = held.get("rows", {})

    def begin(self, settings, facts):
        """Rows of other settings cannot stand beside these."""
        for key, value in settings.items():
            if self.settings and self.settings.get(key) != value:
                sys.exit(
                    f"{self.path} holds rows that were measured with another {key}: "
                    f"{self.settings.get(key)}, now {value}. Name another file with --results."
                )
        self.settings, self.facts = settings, facts

    def has(self, base, variant):
        row = self.rows.get(f"{base}, {variant.name}", {})
        return row.get("arguments") == [*variant.arguments, "--steps", str(variant.steps)]

    def of_base(self, base):
        """Its rows by their variants' names."""
        start = f"{base}, "
        return {key[len(start) :]: row for key, row in self.rows.items() if key.startswith(start)}

    def keep(self, base, variant, row):
        with self.lock:
            self.rows[f"{base}, {variant.name}"] = {
                "arguments": [*variant.arguments, "--steps", str(variant.steps)],
                **row,
            }
            part = self.path.with_suffix(".part")
            held = {"settings": self.settings, "facts": self.facts, "rows": self.rows}
            part.write_text(json.dumps(held, indent=1, ensure_ascii=False) + "\n")
            part.rename(self.path)


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
        # One set of noise for each base of a call.
        self.noise_files = {copies: options.work / f"noise-{copies}.pt" for copies in (1, 2)}
        for copies, file in self.noise_files.items():
            torch.save(torch.cat([noise.cpu() for noise in self.noise] * copies), file)

    def draw(self, variant, bases, number):
        """The file of the pictures of each base, and the command's report. An empty prompt draws
        without words."""
        options = self.options
        prompts = [
            f"--prompt={'' if base == WORDLESS else name}" for base in bases for name in self.names
        ]
        pictures, report = (options.work / f"{number}.{kind}" for kind in ("pt", "json"))
        # Without words there is no cfg.
        cfg = bases[-1].removeprefix("cfg ") if bases[-1] != WORDLESS else "1"
        command = [
            *(options.sag_sample, "--model", options.model),
            *("--noise", self.noise_files[len(bases)], "--cfg", cfg),
            *("--sampler", "euler", "--schedule", "karras", "--steps", variant.steps),
            *("--max-rows", options.max_rows, "--no-cuda-graph", "--quiet"),
            *("--save-latent", pictures, "--json", report),
            *variant.arguments,
        ]
        try:
            if subprocess.run([*map(str, command), *prompts]).returncode:
                raise RuntimeError(f"{options.sag_sample} failed with {variant.arguments}")
            return pictures, json.loads(report.read_text())
        finally:
            report.unlink(missing_ok=True)


def costs(run, pictures):
    """UNet rows a picture, and the share that was blurred. scripts/bench.sh measures time."""
    masked = [step["masked"] for step in run["steps"] if step["masked"] is not None]
    return {
        "unet_rows": run["rows"] / pictures,
        "masked": sum(masked) / len(masked) if masked else None,
    }


def idle_guidances(run):
    """Those that never guided, with their reasons."""
    notes = [note for step in run["steps"] for note in step["guidances"]]
    idle = set(run["guidances"]) - {note["guidance"] for note in notes if note["guided"]}
    return {note["guidance"]: note["reason"] for note in notes if note["guidance"] in idle}


def device_name():
    return f"one {torch.cuda.get_device_name()}" if torch.cuda.is_available() else "a CPU"


class Judgement:
    """Turns pictures into rows."""

    def __init__(self, gallery, sampler, results):
        self.gallery, self.sampler, self.results = gallery, sampler, results
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
        result = {"fd": [], "fd_without": [], "top1": None if base == WORDLESS else []}
        sets = self.sampler.glyphs
        for glyphs, of_set in zip(sets, pictures.chunk(len(sets)), strict=True):
            features, named = judging.look(self.gallery.judge, of_set.to(glyphs.device))
            whole, without = self.distances(features.cpu())
            result["fd"].append(whole)
            result["fd_without"].append(without)
            if base != WORDLESS:
                result["top1"].append((named == glyphs).float().mean().item())
        return result

    @torch.no_grad()
    def __call__(self, variant, bases, file, report):
        pictures = torch.load(file, weights_only=True).chunk(len(bases))
        for place, base in enumerate(bases):
            first, count = place * len(pictures[0]), len(pictures[0])
            run = next(run for run in report["runs"] if run["pictures"][0] == first)
            if idle := idle_guidances(run):
                raise RuntimeError(f"{base}, {variant.name}: not guided: {idle}")
            row = {
                "date": datetime.date.today().isoformat(),
                "device": device_name(),
                "pictures": count,
                **self.judge(base, pictures[place]),
                **costs(run, count),
            }
            self.results.keep(base, variant, row)
            fd = sum(row["fd"]) / len(row["fd"])
            say(f"{base}, {variant.name}: FD {fd:.3f}, {row['unet_rows']:.0f} rows")


def say(text):
    print(text, file=sys.stderr, flush=True)


class Measurement:
    """Draws and judges one call after the other."""

    def __init__(self, options, sampler, judgement):
        self.options, self.sampler, self.judgement = options, sampler, judgement
        self.failures = []

    def missing(self, results):
        """Calls for the rows that --rows asks for and that are not finished."""
        variants = all_variants(self.options.steps, self.options.scale)
        for name, bases in planned_calls():
            left = tuple(
                base
                for base in bases
                if self.options.wanted(base, name) and not results.has(base, variants[name])
            )
            if left:
                yield variants[name], left

    def measure(self, number, variant, bases):
        file = None
        try:
            file, report = self.sampler.draw(variant, bases, number)
            self.judgement(variant, bases, file, report)
        except Exception as error:
            # Other rows do not depend on this one.
            self.failures.append(f"{' and '.join(bases)}, {variant.name}: {str(error)[:500]}")
            say(f"failed: {self.failures[-1]}")
        finally:
            if file:
                file.unlink(missing_ok=True)

    def in_time(self, numbered):
        number, (variant, bases) = numbered
        passed = time.time() - self.options.started
        if passed < 60 * self.options.minutes:
            say(f"{passed:.0f} s: {' and '.join(bases)}, {variant.name}")
            self.measure(number, variant, bases)

    def run(self, results):
        """Several calls at a time keep the GPU busy while one of them starts or is judged."""
        calls = list(self.missing(results))
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as pool:
            list(pool.map(self.in_time, enumerate(calls)))


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
    add("--work", type=pathlib.Path, help="for files that are made (default: build/quality)")
    add("--results", type=pathlib.Path, help="finished rows (default: rows.json in --work)")
    add("--doc", type=pathlib.Path, help="put the tables between the marks of this document, too")
    add("--list", action="store_true", help="print the rows with their prices, and stop")
    add("--only-tables", action="store_true", help="print the tables of --results, and stop")
    add("--jobs", type=int, default=2, help="calls of the command at a time")
    add("--rows", metavar="REGEX", help="only these, as in 'cfg 1|none'")
    add("--sets", type=int, default=3)
    add("--pictures", type=int, default=2000, help="in a noise set")
    add("--minutes", type=float, default=float("inf"), help="begin no row after this time")
    add("--steps", type=int, default=20)
    add("--scale", type=float, default=1.0, help="of SAG")
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
        options.rows = options.rows or "cfg 2, (none$|SAG|PAG|APG)"
    options.work = options.work or ROOT / (
        "build/quality-smoke" if options.smoke else "build/quality"
    )
    options.results = options.results or options.work / "rows.json"
    options.judge = options.judge or (
        options.work / "judge.pt" if options.smoke else options.glyphs.with_name("judge.pt")
    )
    options.wanted = lambda base, name: re.search(options.rows or "", f"{base}, {name}")
    return options


def measure(options):
    options.work.mkdir(parents=True, exist_ok=True)
    make_judge(options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gallery, results = Gallery(options, device), Results(options.results)
    results.begin(settings_of(options), gallery.facts)
    sampler = Sampler(options, gallery)
    measurement = Measurement(options, sampler, Judgement(gallery, sampler, results))
    measurement.run(results)
    return results, measurement.failures


def show(results, document):
    for title, text in tables.all_tables(results).items():
        print(f"{title}\n\n{text}\n")
        if document:
            tables.insert(title, text, document)


@torch.no_grad()
def main():
    options = read_options()
    if options.list:
        pictures = options.sets * options.pictures
        print(*price_list(options.steps, options.scale, options.wanted, pictures), sep="\n")
        return
    results, failures = (Results(options.results), []) if options.only_tables else measure(options)
    show(results, options.doc)
    if failures:
        sys.exit("These rows could not be measured:\n" + "\n".join(failures))


if __name__ == "__main__":
    main()
