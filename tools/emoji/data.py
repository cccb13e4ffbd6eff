"""The glyphs and their captions on the device, and random training batches of both."""

import numpy as np
import torch
import torch.nn.functional as F

# Pixels that a glyph may be shifted by.
MARGIN = 4


class Glyphs:
    """Pictures are [-1, 1]; `real` [glyphs, 3, 64, 64] are the glyphs as rendered, never shifted or
    scaled."""

    def __init__(self, path, device, limit=None):
        archive = np.load(path)
        captions = [line.split("|") for line in str(archive["captions"]).split("\n")]
        chosen = (
            np.arange(len(captions))
            if not limit
            else np.linspace(0, len(captions) - 1, limit).astype(int)
        )
        pictures = torch.from_numpy(archive["pictures"][:, chosen]).to(device)
        self.captions = [captions[i] for i in chosen]
        self.sizes, self.count, self.side = *pictures.shape[:2], pictures.shape[2]
        self.real = to_signed(pictures[0].permute(0, 3, 1, 2))
        self.padded = F.pad(pictures.flatten(0, 1), (0, 0) + (MARGIN,) * 4, value=255)

    def batch(self, count, shift=2, shifted=0.5, scaled=0.4, glyph=None):
        """Random or given glyphs, some a little shifted and some a little smaller: pictures, glyph
        numbers."""
        device = self.padded.device
        glyph = torch.randint(self.count, (count,), device=device) if glyph is None else glyph
        size = torch.randint(1, self.sizes, (count,), device=device) * (
            torch.rand(count, device=device) < scaled
        )
        moved = torch.rand(count, 2, device=device) < shifted
        offset = torch.randint(-shift, shift + 1, (count, 2), device=device) * moved + MARGIN
        rows, columns = (offset[..., None] + torch.arange(self.side, device=device)).unbind(1)
        pictures = self.padded[
            (size * self.count + glyph)[:, None, None], rows[:, :, None], columns[:, None, :]
        ]
        return to_signed(pictures.permute(0, 3, 1, 2)), glyph


def to_signed(pictures):
    return pictures.float() / 127.5 - 1


class Captions:
    """Every caption as the text encoder's buckets; row 0 is the empty caption."""

    def __init__(self, captions, encoder, device):
        lines = [""] + [name for names in captions for name in names]
        tokenized = [encoder.tokenize(line) for line in lines]
        longest = max(len(word) for trigrams, _ in tokenized for word in trigrams)
        trigrams = torch.zeros(len(lines), encoder.tokens, longest, dtype=torch.long)
        words = torch.zeros(len(lines), encoder.tokens, dtype=torch.long)
        for line, (word_trigrams, word_buckets) in enumerate(tokenized):
            for i, (buckets, word) in enumerate(zip(word_trigrams, word_buckets, strict=True)):
                trigrams[line, i, : len(buckets)] = torch.tensor(buckets)
                words[line, i] = word
        counts = torch.tensor([len(names) for names in captions])
        self.trigrams, self.words, self.counts = (
            trigrams.to(device),
            words.to(device),
            counts.to(device),
        )
        self.first = 1 + self.counts.cumsum(0) - self.counts

    def names(self, glyphs):
        """The first name of each glyph, whole."""
        return self.trigrams[self.first[glyphs]], self.words[self.first[glyphs]]

    def empty(self):
        return self.trigrams[:1], self.words[:1]

    def batch(self, glyphs, dropped=0.15, thinned=0.5, shuffled=0.25):
        """A random name of each glyph; some lose words, some their order, some everything."""
        device, count = glyphs.device, len(glyphs)

        def rand(*shape):
            return torch.rand(*shape, device=device)

        line = self.first[glyphs] + (rand(count) * self.counts[glyphs]).long()
        words = self.words[line]
        tokens = words.shape[1]
        present = words > 0
        keep = (rand(count, tokens) < rand(count, 1) * 0.7 + 0.3) | (rand(count, 1) >= thinned)
        # One word always stays.
        one = rand(count, tokens).masked_fill(~present, -1).argmax(1)
        one = F.one_hot(one, tokens).bool()
        keep = (keep | one) & present & (rand(count, 1) >= dropped)
        place = torch.where(
            rand(count, 1) < shuffled,
            rand(count, tokens) * tokens,
            torch.arange(tokens, device=device).float(),
        )
        order = place.masked_fill(~keep, tokens + 1).argsort(1)
        words = (words * keep).gather(1, order)
        trigrams = (self.trigrams[line] * keep[..., None]).gather(
            1, order[..., None].expand(-1, -1, self.trigrams.shape[2])
        )
        return trigrams, words
