"""Render every single-code-point glyph of Noto Color Emoji and collect its names.

The archive holds `pictures` uint8 [sizes, glyphs, 64, 64, 3] (the same glyph at each of SIZES, on
white) and `captions`, a line for each glyph with its names and '|' between them: the CLDR short
name first, then the Unicode name if it is another one.
"""

import argparse
import re
import unicodedata

import emoji
import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

SIDE = 64
SIZES = (64, 62, 60, 58)
# The only bitmap size in the font.
STRIKE = 109
# Holds its bitmaps of 136x128 pixels and a small margin.
CELL = 144

# These are not pictures of their own: joiners, keycap parts, variation selectors, halves of flags,
# bare skin tones, private use, tags.
NOT_GLYPHS = (
    (0x00, 0xA8),
    (0x200D, 0x200D),
    (0x20E3, 0x20E3),
    (0xFE00, 0xFE0F),
    (0x1F1E6, 0x1F1FF),
    (0x1F3FB, 0x1F3FF),
    (0xE000, 0xF8FF),
    (0xE0000, 0x10FFFF),
)


def plain(name):
    """Lower-case ASCII words: what the text encoder can read."""
    ascii_name = (
        unicodedata.normalize("NFKD", re.sub("['’]", "", name))
        .encode("ascii", "ignore")
        .decode()
        .lower()
    )
    return " ".join(re.findall(r"[a-z0-9]+", ascii_name))


def short_names():
    """CLDR short names of the emoji that are one code point."""
    names = {}
    for sequence, data in emoji.EMOJI_DATA.items():
        bare = sequence.replace("\ufe0f", "")
        if len(bare) == 1:
            names[ord(bare)] = plain(data["en"].replace("_", " "))
    return names


def names_of(code_point, short):
    """A Unicode name that is the short name of another emoji ("grinning face with smiling eyes") is
    left out."""
    short_name, unicode_name = (
        short.get(code_point, ""),
        plain(unicodedata.name(chr(code_point), "")),
    )
    names = [short_name] if unicode_name in short.values() else [short_name, unicode_name]
    return [name for name in names if name]


def draw(font, character):
    """The glyph centred in a white CELL x CELL picture, or None where the font draws nothing."""
    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    layer = Image.new("RGBA", (CELL, CELL), (255, 255, 255, 0))
    origin = ((CELL - (right - left)) // 2 - left, (CELL - (bottom - top)) // 2 - top)
    ImageDraw.Draw(layer).text(origin, character, font=font, embedded_color=True)
    picture = Image.new("RGBA", layer.size, (255, 255, 255, 255))
    picture.alpha_composite(layer)
    picture = picture.convert("RGB")
    return picture if min(low for low, _ in picture.getextrema()) < 235 else None


def at_size(picture, size):
    canvas = Image.new("RGB", (SIDE, SIDE), (255, 255, 255))
    canvas.paste(picture.resize((size, size), Image.LANCZOS), ((SIDE - size) // 2,) * 2)
    return np.asarray(canvas)


def render(font_path):
    """Pictures per size and names per glyph. Code points that share a picture are one glyph with
    the names of all."""
    font, short = ImageFont.truetype(font_path, size=STRIKE), short_names()
    pictures, captions, seen = [], [], {}
    for code_point in sorted(TTFont(font_path).getBestCmap()):
        if any(first <= code_point <= last for first, last in NOT_GLYPHS):
            continue
        names, picture = names_of(code_point, short), draw(font, chr(code_point))
        if not names or picture is None:
            continue
        index = seen.setdefault(picture.tobytes(), len(pictures))
        if index == len(pictures):
            pictures.append([at_size(picture, size) for size in SIZES])
            captions.append([])
        captions[index] += [name for name in names if name not in captions[index]]
    return np.stack(pictures, axis=1), captions


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--font", required=True)
    parser.add_argument("--out", required=True)
    options = parser.parse_args()
    pictures, captions = render(options.font)
    np.savez_compressed(
        options.out, pictures=pictures, captions="\n".join("|".join(names) for names in captions)
    )
    different = {name for names in captions for name in names}
    print(f"{len(captions)} glyphs, {sum(map(len, captions))} captions, {len(different)} different")


if __name__ == "__main__":
    main()
