"""CLIP's tokenizer as a TorchScript module. It does what CLIPTokenizerFast does, with tables that
are made at the export.

A text in TorchScript is UTF-8 bytes, so the module decodes it and works on lists of code points.
"""

import functools
import json
import sys
import unicodedata
from typing import Final

import torch
from torch import Tensor, nn

from sag_export.mistake import Mistake

SPACE, LETTER, NUMBER, OTHER = 0, 1, 2, 3
# Unicode's White_Space.
SPACES = {
    *range(0x09, 0x0E),
    0x20,
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200B),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
}
# Composed by a rule, not by a table.
HANGUL = range(0xAC00, 0xAC00 + 11172)
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
NORMALIZERS = [
    {"type": "NFC"},
    {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "},
    {"type": "Lowercase"},
]
PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def codes(text: str) -> list[int]:
    return [ord(character) for character in text]


def class_of(code: int) -> int:
    category = unicodedata.category(chr(code))[0]
    return SPACE if code in SPACES else {"L": LETTER, "N": NUMBER}.get(category, OTHER)


# The tables take a second, and are the same for every tokenizer.
@functools.cache
def class_ranges() -> tuple[list[int], list[int]]:
    """The first code point of every range of one class, and the classes."""
    starts, classes = [], []
    for code in range(sys.maxunicode + 1):
        found = class_of(code)
        if not classes or classes[-1] != found:
            starts.append(code)
            classes.append(found)
    return starts, classes


@functools.cache
def unicode_tables():
    """Lower case, canonical decompositions, combining classes, and compositions by first · 2²¹ +
    second."""
    lower, decompositions, combining, compositions = {}, {}, {}, {}
    for code in range(sys.maxunicode + 1):
        character = chr(code)
        if character.lower() != character:
            lower[code] = codes(character.lower())
        if unicodedata.combining(character):
            combining[code] = unicodedata.combining(character)
        parts = unicodedata.decomposition(character)
        if code in HANGUL or not parts or parts.startswith("<"):
            continue
        decompositions[code] = codes(unicodedata.normalize("NFD", character))
        pair = [int(part, 16) for part in parts.split()]
        if len(pair) == 2 and unicodedata.normalize("NFC", character) == character:
            compositions[(pair[0] << 21) + pair[1]] = code
    return lower, decompositions, combining, compositions


def byte_characters() -> list[str]:
    """The characters that stand for the 256 bytes in a byte-level vocabulary."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def vector_ids(added_tokens) -> dict[str, list[int]]:
    """The ids that each added token stands for. A textual inversion of several vectors is saved as
    the tokens <fox>, <fox>_1, <fox>_2 ..., and a prompt names the first, as in diffusers'
    maybe_convert_prompt. (That one replaces in the text, and so spoils a prompt with both "<fox>"
    and "<fox>_1", or with one token that is a part of another.)"""
    known = {token["content"]: token["id"] for token in added_tokens}
    ids = {}
    for content, first in known.items():
        ids[content] = [first]
        while (following := f"{content}_{len(ids[content])}") in known:
            ids[content].append(known[following])
    return ids


def normalized_tokens(normalizer, added_tokens, ids) -> dict[str, list[int]]:
    """The added tokens that are looked for in the normalized text."""
    tokens = {}
    for token in added_tokens:
        content = token["content"]
        if token["single_word"]:
            raise Mistake(
                f'The tokenizer\'s added token "{content}" must be found anywhere, but it is one '
                'for whole words only ("single_word").'
            )
        if not token["normalized"]:
            continue
        normal = normalizer.normalize_str(content)
        if normal in tokens:
            raise Mistake(
                f'The tokenizer\'s added token "{content}" is the same as another one in lower '
                "case; give one of them another name."
            )
        tokens[normal] = ids[content]
    return tokens


def longest_first(tokens: dict[str, list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Their code points and their ids."""
    contents = sorted(tokens, key=len, reverse=True)
    return [codes(content) for content in contents], [tokens[content] for content in contents]


class ClipTokenizer(nn.Module):
    """Texts to ids [1, tokens]: begin, the words' pieces, end, padding. To be scripted."""

    SPACE: Final[int] = SPACE
    NUMBER: Final[int] = NUMBER

    vocabulary_size: int
    merges: dict[int, int]
    byte_ids: list[int]
    last_byte_ids: list[int]
    raw_added: list[list[int]]
    raw_added_ids: list[list[int]]
    added: list[list[int]]
    added_ids: list[list[int]]
    class_starts: list[int]
    classes: list[int]
    lower: dict[int, list[int]]
    decompositions: dict[int, list[int]]
    combining: dict[int, int]
    compositions: dict[int, int]
    contractions: list[list[int]]

    def __init__(self, tokenizer, tokens: int):
        """`tokenizer`: a CLIPTokenizerFast; `tokens`: how many the text model reads."""
        super().__init__()
        description = json.loads(tokenizer.backend_tokenizer.to_str())
        check_is_clip(description)
        vocabulary = description["model"]["vocab"]
        self.tokens = tokens
        self.begin: int = tokenizer.bos_token_id
        self.end: int = tokenizer.eos_token_id
        self.padding: int = tokenizer.pad_token_id
        self.vocabulary_size = 1 + max(vocabulary.values())
        characters = byte_characters()
        missing = [c for c in characters if c not in vocabulary or c + "</w>" not in vocabulary]
        if missing:
            raise Mistake(
                'The tokenizer\'s vocabulary must hold every byte, with and without "</w>"; it '
                f'lacks "{missing[0]}".'
            )
        self.byte_ids = [vocabulary[c] for c in characters]
        self.last_byte_ids = [vocabulary[c + "</w>"] for c in characters]
        self.merges = {}
        for rank, (left, right) in enumerate(description["model"]["merges"]):
            pair = vocabulary[left] * self.vocabulary_size + vocabulary[right]
            self.merges.setdefault(pair, rank * self.vocabulary_size + vocabulary[left + right])
        tokens_added = description["added_tokens"]
        ids = vector_ids(tokens_added)
        # Those that are not normalized are looked for in the text as it is, before the others.
        self.raw_added, self.raw_added_ids = longest_first(
            {t["content"]: ids[t["content"]] for t in tokens_added if not t["normalized"]}
        )
        self.added, self.added_ids = longest_first(
            normalized_tokens(tokenizer.backend_tokenizer.normalizer, tokens_added, ids)
        )
        self.class_starts, self.classes = class_ranges()
        self.lower, self.decompositions, self.combining, self.compositions = unicode_tables()
        self.contractions = [codes(contraction) for contraction in CONTRACTIONS]

    @torch.jit.export
    def ids(self, text: str) -> Tensor:
        """[1, tokens] int64."""
        return self.weighted_ids([text], [1.0])[0]

    @torch.jit.export
    def weighted_ids(self, pieces: list[str], weights: list[float]) -> tuple[Tensor, Tensor]:
        """Ids [1, tokens] int64 of pieces that follow each other, no word going from one into the
        next, and the weight of every token [1, tokens, 1] fp32. Begin, end and padding weigh 1."""
        ids = [self.begin]
        token_weights = [1.0]
        for i in range(len(pieces)):
            for word in self.words(pieces[i])[0]:
                ids.extend(word)
                token_weights.extend([weights[i]] * len(word))
        ids = ids[: self.tokens - 1]
        token_weights = token_weights[: self.tokens - 1]
        ids.append(self.end)
        while len(ids) < self.tokens:
            ids.append(self.padding)
        while len(token_weights) < self.tokens:
            token_weights.append(1.0)
        return (
            torch.tensor([ids], dtype=torch.long),
            torch.tensor(token_weights, dtype=torch.float).reshape(1, -1, 1),
        )

    @torch.jit.export
    def cut(self, text: str) -> str:
        """The part of the text that does not fit, from the beginning of a word, in lower case. ""
        if all of it fits."""
        return self.cut_pieces([text])

    @torch.jit.export
    def cut_pieces(self, pieces: list[str]) -> str:
        """The same of pieces, with a space before each that is left out whole."""
        rest = ""
        left = self.tokens - 2
        for piece in pieces:
            words, starts, text = self.words(piece)
            if left < 0:
                rest += " " + self.encoded(text)
            for i in range(len(words)):
                if left >= 0:
                    left -= len(words[i])
                    if left < 0:
                        rest = self.encoded(text[starts[i] :])
        return rest

    @torch.jit.export
    def words(self, text: str) -> tuple[list[list[int]], list[int], list[int]]:
        """The ids of every word, where it begins in the normalized text, and that text."""
        words: list[list[int]] = []
        starts: list[int] = []
        normal: list[int] = []
        raw = self.decoded(text)
        start = 0
        for end in range(len(raw) + 1):
            if end < start:
                continue
            added = self.added_at(self.raw_added, raw, end)
            if added < 0 and end < len(raw):
                continue
            self.append_words(raw[start:end], words, starts, normal)
            if added >= 0:
                words.append(self.raw_added_ids[added])
                starts.append(len(normal))
                start = end + len(self.raw_added[added])
                normal.extend(raw[end:start])
        return words, starts, normal

    def append_words(
        self, raw: list[int], words: list[list[int]], starts: list[int], normal: list[int]
    ):
        text = self.normalized(raw)
        start = 0
        while start < len(text):
            added = self.added_at(self.added, text, start)
            end = start + 1
            if added >= 0:
                end = start + len(self.added[added])
                words.append(self.added_ids[added])
                starts.append(len(normal) + start)
            elif self.class_at(text[start]) != self.SPACE:
                end = self.word_end(text, start)
                words.append(self.merged(text[start:end]))
                starts.append(len(normal) + start)
            start = end
        normal.extend(text)

    def word_end(self, text: list[int], start: int) -> int:
        """'s 't 're 've 'm 'll 'd, a run of letters, one digit, or a run of other characters that
        are not spaces."""
        for contraction in self.contractions:
            end = start + len(contraction)
            if text[start:end] == contraction and not self.added_within(text, start + 1, end):
                return end
        kind = self.class_at(text[start])
        end = start + 1
        while (
            kind != self.NUMBER
            and end < len(text)
            and self.class_at(text[end]) == kind
            and self.added_at(self.added, text, end) < 0
        ):
            end += 1
        return end

    def added_within(self, text: list[int], start: int, end: int) -> bool:
        found = False
        for i in range(start, end):
            found = found or self.added_at(self.added, text, i) >= 0
        return found

    def added_at(self, tokens: list[list[int]], text: list[int], start: int) -> int:
        """Which of these added tokens (<|endoftext|> for example) begins here; -1 if none does."""
        if start < len(text):
            for i in range(len(tokens)):
                token = tokens[i]
                if text[start] == token[0] and text[start : start + len(token)] == token:
                    return i
        return -1

    def class_at(self, code: int) -> int:
        low = 0
        high = len(self.class_starts)
        while high - low > 1:
            middle = (low + high) // 2
            if self.class_starts[middle] <= code:
                low = middle
            else:
                high = middle
        return self.classes[low]

    def merged(self, word: list[int]) -> list[int]:
        """Byte pair encoding: joins the pair with the lowest rank, the leftmost of equal ones,
        until no pair can be joined."""
        never = 1 << 62
        characters = self.utf8(word)
        ids = [self.byte_ids[byte] for byte in characters]
        ids[-1] = self.last_byte_ids[characters[-1]]
        merges = [self.merge_of(ids[i], ids[i + 1]) for i in range(len(ids) - 1)]
        while len(merges) > 0:
            best = min(merges)
            if best == never:
                break
            i = merges.index(best)
            ids[i] = best % self.vocabulary_size
            ids.pop(i + 1)
            merges.pop(i)
            if i > 0:
                merges[i - 1] = self.merge_of(ids[i - 1], ids[i])
            if i < len(merges):
                merges[i] = self.merge_of(ids[i], ids[i + 1])
        return ids

    def merge_of(self, left: int, right: int) -> int:
        """Rank · vocabulary size + id of the pair."""
        return self.merges.get(left * self.vocabulary_size + right, 1 << 62)

    def normalized(self, text: list[int]) -> list[int]:
        """Composed (NFC), in lower case, with one space for every run of spaces."""
        normal: list[int] = []
        for code in self.composed(text):
            if self.class_at(code) == self.SPACE:
                if len(normal) == 0 or normal[-1] != 32:
                    normal.append(32)
            elif code in self.lower:
                normal.extend(self.lower[code])
            else:
                normal.append(code)
        return normal

    def composed(self, text: list[int]) -> list[int]:
        """Unicode's normalization form C."""
        if len(text) == 0 or max(text) < 0x300:
            return text
        parts: list[int] = []
        for code in text:
            self.append_in_order(parts, code)
        return self.compose(parts)

    def append_in_order(self, parts: list[int], code: int):
        """Appends the canonical decomposition, with marks in the order of their combining
        classes."""
        syllable = code - 0xAC00
        if syllable >= 0 and syllable < 11172:
            parts.extend([0x1100 + syllable // 588, 0x1161 + syllable % 588 // 28])
            if syllable % 28 > 0:
                parts.append(0x11A7 + syllable % 28)
            return
        for part in self.decompositions.get(code, [code]):
            mark = self.combining.get(part, 0)
            place = len(parts)
            while mark > 0 and place > 0 and self.combining.get(parts[place - 1], 0) > mark:
                place -= 1
            parts.insert(place, part)

    def compose(self, parts: list[int]) -> list[int]:
        """Joins every starter with what follows it, unless it is blocked."""
        out: list[int] = []
        starter = -1
        last_mark = 0
        for code in parts:
            mark = self.combining.get(code, 0)
            blocked = starter < len(out) - 1 and (last_mark == 0 or last_mark >= mark)
            joined = self.joined(out[starter], code) if starter >= 0 and not blocked else -1
            if joined >= 0:
                out[starter] = joined
                continue
            if mark == 0:
                starter = len(out)
            out.append(code)
            last_mark = mark
        return out

    def joined(self, first: int, second: int) -> int:
        leading = first - 0x1100
        vowel = second - 0x1161
        if leading >= 0 and leading < 19 and vowel >= 0 and vowel < 21:
            return 0xAC00 + (leading * 21 + vowel) * 28
        syllable = first - 0xAC00
        trailing = second - 0x11A7
        if (
            syllable >= 0
            and syllable < 11172
            and syllable % 28 == 0
            and trailing > 0
            and trailing < 28
        ):
            return first + trailing
        return self.compositions.get((first << 21) + second, -1)

    def decoded(self, text: str) -> list[int]:
        """UTF-8 to code points. Bytes that are not UTF-8 become U+FFFD."""
        out: list[int] = []
        code = 0
        expected = 0
        least = 0
        for character in text:
            byte = ord(character)
            if expected > 0 and byte // 64 == 2:
                code = code * 64 + byte % 64
                expected -= 1
                if expected == 0:
                    bad = code < least or code > 0x10FFFF or (code >= 0xD800 and code < 0xE000)
                    out.append(0xFFFD if bad else code)
                continue
            if expected > 0:
                out.append(0xFFFD)
            expected = 0
            if byte < 0x80:
                out.append(byte)
            elif byte >= 0xC2 and byte < 0xE0:
                code, expected, least = byte % 32, 1, 0x80
            elif byte >= 0xE0 and byte < 0xF0:
                code, expected, least = byte % 16, 2, 0x800
            elif byte >= 0xF0 and byte < 0xF5:
                code, expected, least = byte % 8, 3, 0x10000
            else:
                out.append(0xFFFD)
        if expected > 0:
            out.append(0xFFFD)
        return out

    def utf8(self, text: list[int]) -> list[int]:
        out: list[int] = []
        for code in text:
            if code < 0x80:
                out.append(code)
            elif code < 0x800:
                out.extend([0xC0 + code // 64, 0x80 + code % 64])
            elif code < 0x10000:
                out.extend([0xE0 + code // 4096, 0x80 + code // 64 % 64, 0x80 + code % 64])
            else:
                out.extend(
                    [
                        0xF0 + code // 262144,
                        0x80 + code // 4096 % 64,
                        0x80 + code // 64 % 64,
                        0x80 + code % 64,
                    ]
                )
        return out

    def encoded(self, text: list[int]) -> str:
        characters: list[str] = []
        for byte in self.utf8(text):
            characters.append(chr(byte))
        return "".join(characters)


def check_is_clip(description):
    """Throws Mistake unless the tokenizer normalizes, splits and encodes as CLIP's does."""
    model, normalizer, words = (
        description["model"],
        description["normalizer"] or {},
        description["pre_tokenizer"] or {},
    )
    split = (words.get("pretokenizers") or [{}])[0]
    same = (
        model["type"] == "BPE"
        and model.get("end_of_word_suffix") == "</w>"
        and not model.get("ignore_merges")
        and normalizer.get("normalizers") == NORMALIZERS
        and split.get("pattern") == {"Regex": PATTERN}
    )
    if not same:
        raise Mistake(
            "The tokenizer must work as CLIP's does (NFC, lower case, byte pairs with </w>), but "
            "this one does not."
        )
