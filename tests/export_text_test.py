"""The exporter's text encoders: textual inversions, weights of parts of a prompt, and layers."""

import contextlib
import io
import random
import shutil
import unittest

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import AddedToken
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPTokenizerFast,
)

import make_tiny_pipeline
from export_model_test import Case
from sag_export import text
from sag_export.mistake import Mistake
from sag_export.tokenizer import ClipTokenizer
from text_encoder_fixture import make_model

PROMPTS = ("", "  \n ", "red cat!", "the cat's — über-schnell 🚀", "x " * 90)


class TextCase(Case):
    def tokenizer(self, *added, vectors=None):
        """A tokenizer with added tokens: texts or AddedTokens. vectors: how many of a name."""
        folder = self.folder / "tokenizer"
        if not folder.exists():
            make_tiny_pipeline.write_tokenizer(folder)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder)
        for token in added:
            tokenizer.add_tokens(token)
        for name, count in (vectors or {}).items():
            tokenizer.add_tokens([name, *(f"{name}_{i}" for i in range(1, count))])
        return tokenizer

    def assert_near(self, one, other, what=None):
        self.assertEqual(one.shape, other.shape, what)
        self.assertLessEqual((one - other).abs().max(), 1e-5 * other.abs().max(), what)


def padded_ids(tokenizer, prompt):
    return tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids


class TextualInversion(TextCase):
    NAMES = ("<fox>", "<fo", "foxes", "fox", "s0", "my style", "*", "Ünï", "<OWL>", "cat")

    def test_one_vector_gives_the_references_ids(self):
        """One name is a part of another, has upper case, a space, a mark, or a word of the
        vocabulary; one is looked for in the text as it is."""
        tokenizer = self.tokenizer(
            *self.NAMES,
            AddedToken("<Raw>", special=True),
            AddedToken("<raw> x", normalized=False, lstrip=True, rstrip=True),
            AddedToken("stripped", lstrip=True, rstrip=True),
        )
        scripted = torch.jit.script(ClipTokenizer(tokenizer, 77))
        chance = random.Random(0)
        parts = (
            *self.NAMES,
            *("<Raw>", "<raw> x", "<raw>", " ", "  ", "e", "'", "'s", "_1", "<", ">", "1", "Cat"),
            *("stripped", "u\u0308ni\u0308", "\u0308", "Σ", "\n", "<owl>", "<FOX>"),
        )
        for _ in range(600):
            prompt = "".join(chance.choice(parts) for _ in range(chance.randrange(12)))
            self.assertEqual(
                scripted.ids(prompt)[0].tolist(), padded_ids(tokenizer, prompt), repr(prompt)
            )

    def test_several_vectors_stand_in_place_of_the_name(self):
        vectors = {"<fox>": 3, "<foxes>": 1, "<fo": 12, "+*+": 2, "<OWL>": 2}
        tokenizer = self.tokenizer(vectors=vectors)
        scripted = torch.jit.script(ClipTokenizer(tokenizer, 77))
        # That of pipelines.
        slow = CLIPTokenizer.from_pretrained(self.folder / "tokenizer")
        slow.add_tokens(list(tokenizer.get_added_vocab())[2:])
        convert = TextualInversionLoaderMixin().maybe_convert_prompt
        prompts = [
            "a <fox> cat",
            "<fox>,<fox>",
            "<foxes>+*+",
            "a<fo cat",
            "<OWL> and +*+!",
            "<fox>_x",
        ]
        prompts += ["<fox>_1", "a <fo_11 of <fo_9", "<fox> " * 30, "<fo " * 7, "cat"]
        for prompt in prompts:
            expected = padded_ids(tokenizer, convert(prompt, slow))
            self.assertEqual(scripted.ids(prompt)[0].tolist(), expected, prompt)
        # diffusers would replace the name in the second token too.
        first = tokenizer.convert_tokens_to_ids("<fox>")
        ids = scripted.ids("<fox> <fox>_1 <foxes>")[0, 1:6].tolist()
        self.assertEqual(ids, [first, first + 1, first + 2, first + 1, first + 3])

    def test_what_does_not_fit_is_cut_and_named(self):
        tokenizer = self.tokenizer(vectors={"<fox>": 3, "<all>": 100})
        scripted = torch.jit.script(ClipTokenizer(tokenizer, 77))
        self.assertEqual(scripted.cut("a " * 72 + "<fox>"), "")
        self.assertEqual(scripted.cut("a " * 73 + "<fox> cat"), "<fox> cat")
        self.assertEqual(scripted.cut("a <All>"), "<all>")
        ids = scripted.ids("a <all>")[0].tolist()
        first = tokenizer.convert_tokens_to_ids("<all>")
        self.assertEqual(ids[2:], [*range(first, first + 74), tokenizer.eos_token_id])

    def test_names_that_cannot_be_found_as_the_pipeline_does_are_refused(self):
        for added, expected in (
            (AddedToken("<fox>", single_word=True), '"<fox>" must be found anywhere'),
            (["<fox>", "<Fox>"], '"<Fox>" is the same as another one in lower case'),
        ):
            with self.assertRaisesRegex(Mistake, expected):
                ClipTokenizer(self.tokenizer(added), 77)

    def inverted(self, kind, pipeline_class, **seconds):
        """A saved pipeline with a token of three vectors and one of one, and what it encodes."""
        options = {} if seconds else {"safety_checker": None, "requires_safety_checker": False}
        pipe = pipeline_class.from_pretrained(self.pipeline(kind), **options)
        torch.manual_seed(0)
        encoders = [{"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}]
        if seconds:
            encoders.append({"text_encoder": pipe.text_encoder_2, "tokenizer": pipe.tokenizer_2})
        for parts in encoders:
            width = parts["text_encoder"].config.hidden_size
            for token, vectors in (("<fox>", 3), ("<owl>", 1)):
                pipe.load_textual_inversion(
                    {token: torch.randn(vectors, width)}, token=token, **parts
                )
        folder = self.folder / f"inverted-{kind}"
        pipe.save_pretrained(folder)
        return folder, pipeline_class.from_pretrained(folder, **options)

    def test_the_file_gives_the_pipelines_context(self):
        prompts = ("a <fox> cat", "<fox><owl>", "a cat", "<fox> " * 26, "a <owl>, red", "<fox>_2")
        folder, pipe = self.inverted("sd1", StableDiffusionPipeline)
        out, _ = self.export(folder, "inverted-sd1-out")
        encoder = torch.jit.load(str(out / "text_encoder.ts"))
        for prompt in prompts:
            expected = pipe.encode_prompt(prompt, "cpu", 1, False)[0]
            self.assert_near(encoder.encode(prompt), expected, prompt)
        folder, pipe = self.inverted("sdxl", StableDiffusionXLPipeline, both=True)
        out, _ = self.export(folder, "inverted-sdxl-out")
        encoder = torch.jit.load(str(out / "text_encoder.ts"))
        for prompt in prompts:
            expected = pipe.encode_prompt(prompt, device="cpu", do_classifier_free_guidance=False)
            context, y = encoder.encode(prompt, 5, 7)
            self.assert_near(context, expected[0], prompt)
            self.assert_near(y[:, :-6], expected[2], prompt)

    def test_a_tokenizer_with_more_tokens_than_the_text_model_is_refused(self):
        folder = self.folder / "longer"
        shutil.copytree(self.pipeline("sd1"), folder)
        tokenizer = CLIPTokenizerFast.from_pretrained(folder / "tokenizer")
        tokenizer.add_tokens("<fox>")
        tokenizer.save_pretrained(folder / "tokenizer")
        self.assertIn('the last one is "<fox>"', self.mistake(folder))


class Weights(TextCase):
    """Against ComfyUI's formula, on transformers' models."""

    PIECES = (
        (["a ", "red", " cat"], [1.0, 1.3, 1.0]),
        (["a ", "red", "cat"], [1.1, -1.0, 1.1 * 1.1]),
        (["the cat's ", "über"], [1.0, 0.0]),
        (["many words " * 30, "and more " * 30], [1.0, 0.5]),
        (["red"], [1000.0]),
        ([], []),
        (["", " "], [1.0, 2.0]),
        (["a cat"], [1.0]),
    )

    def reference(self, tokenizer, model, pieces, weights, layer, final_norm):
        """One state after the other, by its place."""

        def state(ids):
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-layer]
            return model.text_model.final_layer_norm(hidden) if final_norm else hidden

        ids, token_weights = [], []
        for piece, weight in zip(pieces, weights, strict=True):
            for token in tokenizer(piece, add_special_tokens=False).input_ids:
                ids.append(token)
                token_weights.append(weight)
        ids = [tokenizer.bos_token_id, *ids[:75], tokenizer.eos_token_id]
        ids += [tokenizer.pad_token_id] * (77 - len(ids))
        context, empty = state(ids), state(padded_ids(tokenizer, ""))
        for i, weight in enumerate(token_weights[:75]):
            context[0, i + 1] = empty[0, i + 1] + weight * (context[0, i + 1] - empty[0, i + 1])
        return context, ids

    def test_of_one_encoder(self):
        tokenizer = self.tokenizer()
        model = make_model(CLIPTextModel, tokenizer, 0)
        encoder = text.make_text_encoder(tokenizer, model)
        self.assertEqual(encoder.clip_skip_range(), (1, 3))
        for pieces, weights in self.PIECES * 2:
            for clip_skip, layer in ((0, 1), (1, 1), (2, 2), (3, 3)):
                expected, _ = self.reference(tokenizer, model, pieces, weights, layer, True)
                self.assert_near(encoder.encode_pieces(pieces, weights, clip_skip), expected)

    def test_of_two_encoders(self):
        """The pooled text knows neither weights nor layers."""
        tokenizer = self.tokenizer()
        first = make_model(CLIPTextModel, tokenizer, 0)
        second = make_model(CLIPTextModelWithProjection, tokenizer, 1, layers=4)
        encoder = text.make_text_and_size_encoder(tokenizer, first, tokenizer, second, 8)
        self.assertEqual(encoder.clip_skip_range(), (1, 3))
        for pieces, weights in self.PIECES * 2:
            for clip_skip, layer in ((0, 2), (1, 1), (2, 2), (3, 3)):
                given = (tokenizer, first, pieces, weights, layer, False)
                expected = [self.reference(*given)[0]]
                other, ids = self.reference(tokenizer, second, *given[2:])
                expected.append(other)
                context, y = encoder.encode_pieces(pieces, weights, clip_skip, 5, 7)
                self.assert_near(context, torch.cat(expected, dim=-1))
                pooled = second(torch.tensor([ids])).text_embeds
                self.assert_near(y[:, :-6], pooled)
                self.assertEqual(y[0, -6:].tolist(), [40, 56, 0, 0, 40, 56])

    def test_one_piece_that_weighs_1_is_the_plain_prompt(self):
        tokenizer = self.tokenizer()
        model = make_model(CLIPTextModel, tokenizer, 0)
        encoder = text.make_text_encoder(tokenizer, model)
        for prompt in PROMPTS:
            self.assertTrue(
                encoder.encode(prompt).equal(encoder.encode_pieces([prompt], [1.0], 0)), prompt
            )

    def test_what_is_cut_of_pieces(self):
        scripted = torch.jit.script(ClipTokenizer(self.tokenizer(), 77))
        self.assertEqual(scripted.cut_pieces(["a " * 75, "  "]), "")
        self.assertEqual(scripted.cut_pieces(["a " * 74, "Red cat", "and ", "X"]), "cat and  x")
        self.assertEqual(scripted.cut_pieces([]), "")


class ClipSkip(TextCase):
    """Against diffusers' clip_skip, which counts from the pipeline's own layer."""

    def test_sd1_and_sdxl_give_the_pipelines_layers(self):
        pipe = StableDiffusionPipeline.from_pretrained(
            self.pipeline("sd1"), safety_checker=None, requires_safety_checker=False
        )
        out, _ = self.export(self.pipeline("sd1"), "layers-sd1")
        encoder = torch.jit.load(str(out / "text_encoder.ts"))
        self.assertEqual(encoder.clip_skip_range(), (1, 3))
        for clip_skip, theirs in ((0, None), (1, 0), (1, None), (2, 1), (3, 2)):
            expected = pipe.encode_prompt("red cat", "cpu", 1, False, clip_skip=theirs)[0]
            self.assert_near(encoder.encode_pieces(["red cat"], [1.0], clip_skip), expected)
        pipe = StableDiffusionXLPipeline.from_pretrained(self.pipeline("sdxl"))
        out, _ = self.export(self.pipeline("sdxl"), "layers-sdxl")
        encoder = torch.jit.load(str(out / "text_encoder.ts"))
        for clip_skip, theirs in ((0, None), (2, 0), (2, None), (3, 1)):
            expected = pipe.encode_prompt(
                "red cat", device="cpu", do_classifier_free_guidance=False, clip_skip=theirs
            )
            context, y = encoder.encode_pieces(["red cat"], [1.0], clip_skip, 5, 7)
            self.assert_near(context, expected[0])
            self.assert_near(y[:, :-6], expected[2])

    def test_sd2_counts_the_layer_that_its_folder_leaves_out(self):
        tokenizer = self.tokenizer()
        config = CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=1024,
            intermediate_size=16,
            num_hidden_layers=23,
            num_attention_heads=16,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        torch.manual_seed(0)
        model = CLIPTextModel(config).eval().requires_grad_(False)
        encoder = text.make_text_encoder(tokenizer, model)
        self.assertEqual(encoder.clip_skip_range(), (2, 24))
        out = model(torch.tensor([padded_ids(tokenizer, "red")]), output_hidden_states=True)
        norm = model.text_model.final_layer_norm
        self.assert_near(encoder.encode("red"), out.last_hidden_state)
        for clip_skip, layer in ((2, 1), (3, 2), (24, 23)):
            got = encoder.encode_pieces(["red"], [1.0], clip_skip)
            self.assert_near(got, norm(out.hidden_states[-layer]))

    def test_layers_that_are_not_there_are_an_error(self):
        tokenizer = self.tokenizer()
        encoder = text.make_text_encoder(tokenizer, make_model(CLIPTextModel, tokenizer, 0))
        for clip_skip in (-1, 4):
            with (
                self.assertRaisesRegex(torch.jit.Error, "clip_skip_range"),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                encoder.encode_pieces(["red"], [1.0], clip_skip)


if __name__ == "__main__":
    unittest.main()
