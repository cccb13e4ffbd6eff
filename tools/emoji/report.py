"""The measured table as markdown: printed, and put between the two marks of a README."""
import argparse
import json
import pathlib
import re

MARKS = "<!-- measured -->", "<!-- end of measured -->"


def number(pair, digits, sign=""):
    if not pair:
        return ""
    mean, error = pair
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def markdown(report):
    floors = report["floors"]
    lines = [f"Measured {report['date']}: {report['sets']} noise sets of {report['pictures_in_a_set']} pictures, {report['sampler']}, ± one standard error "
             f"over the sets. The judge names {report['judge_top1_on_real_glyphs']:.1%} of the real glyphs. Real pictures measured in the same way have FD "
             f"{number(floors['named'], 2)} where each is another glyph, as in the rows with cfg, and {number(floors['at_random'], 2)} where glyphs come "
             "at random, as in the unconditional rows.", "",
             "| row | FD | change of FD | plain SAG minus this | top-1 | UNet rows a picture |", "|---|---|---|---|---|---|"]
    for row in report["rows"]:
        lines.append(f"| {row['name'].replace('<=', '≤').replace('sigma', 'σ')} | {number(row['fd'], 2)} | {number(row.get('change'), 2, '+')} | "
                     f"{number(row.get('plain_sag_minus_this'), 2, '+')} | {number(row.get('top1'), 3)} | {row['evaluations']} |")
    return "\n".join(lines)


def insert(table, document):
    """Puts the table between the document's marks."""
    between = re.compile(re.escape(MARKS[0]) + ".*" + re.escape(MARKS[1]), re.S)
    document.write_text(between.sub(lambda _: f"{MARKS[0]}\n{table}\n{MARKS[1]}", document.read_text()))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measured", required=True, type=pathlib.Path)
    parser.add_argument("--readme", type=pathlib.Path)
    options = parser.parse_args()
    table = markdown(json.loads(options.measured.read_text()))
    print(table)
    if options.readme and options.readme.exists():
        insert(table, options.readme)


if __name__ == "__main__":
    main()
