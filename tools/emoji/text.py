"""The text encoder: words in, [1, 8, 128] out. It is scripted, so that C++ can call encode(str),
and hashes words, so that it needs no vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = 8
WIDTH = 128


class TextEncoder(nn.Module):
    """A word is the mean of its hashed character trigrams plus a hashed vector of the whole word. A
    small attention layer mixes the words.

    Bucket 0 of both tables means "nothing here".
    """

    def __init__(
        self,
        width: int = WIDTH,
        tokens: int = TOKENS,
        trigram_buckets: int = 4096,
        word_buckets: int = 2048,
        heads: int = 4,
    ):
        super().__init__()
        self.tokens, self.heads = tokens, heads
        self.trigram_buckets, self.word_buckets = trigram_buckets, word_buckets
        self.trigram = nn.Embedding(trigram_buckets, width, padding_idx=0)
        self.word = nn.Embedding(word_buckets, width, padding_idx=0)
        self.position = nn.Parameter(torch.randn(tokens, width) * 0.2)
        self.absent = nn.Parameter(torch.randn(width) * 0.5)
        self.norm1, self.norm2, self.norm3 = (
            nn.LayerNorm(width),
            nn.LayerNorm(width),
            nn.LayerNorm(width),
        )
        self.to_qkv, self.to_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ff = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        with torch.no_grad():
            self.trigram.weight[1:].mul_(0.7)
            self.word.weight[1:].mul_(0.5)

    @torch.jit.export
    def split_words(self, prompt: str) -> list[str]:
        """Runs of ASCII letters and digits, lower-cased; an apostrophe does not end a word."""
        spaced = ""
        for character in prompt:
            code = ord(character)
            if code >= 65 and code <= 90:
                spaced += chr(code + 32)
            elif (code >= 97 and code <= 122) or (code >= 48 and code <= 57):
                spaced += character
            elif code != 39:
                spaced += " "
        return spaced.split()

    @torch.jit.export
    def bucket(self, characters: str, buckets: int) -> int:
        """FNV-1a of 32 bits, folded to 1 ... buckets - 1."""
        value = 2166136261
        for character in characters:
            value = ((value ^ ord(character)) * 16777619) & 0xFFFFFFFF
        return 1 + (value ^ (value >> 15)) % (buckets - 1)

    @torch.jit.export
    def tokenize(self, prompt: str) -> tuple[list[list[int]], list[int]]:
        """Trigram buckets per word (^ and $ mark its begin and end) and the word's own bucket, for
        the first words."""
        words = self.split_words(prompt)[: self.tokens]
        trigrams = [self.word_trigrams(word) for word in words]
        return trigrams, [self.bucket(word, self.word_buckets) for word in words]

    @torch.jit.export
    def word_trigrams(self, word: str) -> list[int]:
        marked = "^" + word + "$"
        return [self.bucket(marked[i : i + 3], self.trigram_buckets) for i in range(len(word))]

    def forward(self, trigrams: Tensor, words: Tensor) -> Tensor:
        """trigrams [B, tokens, any], words [B, tokens] -> [B, tokens, width]."""
        count = (trigrams > 0).sum(-1, keepdim=True).clamp(min=1)
        x = self.trigram(trigrams).sum(-2) / count.to(self.absent.dtype) + self.word(words)
        x = torch.where((words > 0).unsqueeze(-1), x, self.absent) + self.position
        q, k, v = (
            self.to_qkv(self.norm1(x))
            .unflatten(-1, (3, self.heads, -1))
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        x = x + self.to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.norm3(x + self.ff(self.norm2(x)))

    @torch.jit.export
    def encode(self, prompt: str) -> Tensor:
        trigrams, words = self.tokenize(prompt)
        longest = 1
        for word in trigrams:
            longest = max(longest, len(word))
        rows = torch.zeros(1, self.tokens, longest, dtype=torch.long)
        buckets = torch.zeros(1, self.tokens, dtype=torch.long)
        for i in range(len(words)):
            rows[0, i, : len(trigrams[i])] = torch.tensor(trigrams[i])
            buckets[0, i] = words[i]
        return self.forward(rows.to(self.absent.device), buckets.to(self.absent.device))
