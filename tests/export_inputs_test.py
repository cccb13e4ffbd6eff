"""sag-export and sag-sample with UNets that take more than a latent and text: further channels
(inpainting, instruct-pix2pix), classes, and an embedded scale of guidance."""

import json
import os
import subprocess
import unittest

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import diffusers
import numpy
import torch
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizerFast

import export_model_test

SAMPLE = export_model_test.SAMPLE
KINDS = ("inpaint", "edit", "lcm", "sd1")
UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
CONDITION = {
    **UNET,
    "attention_head_dim": (2, 4),
    "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
PLAIN = {
    **UNET,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}


class Case(export_model_test.Case):
    def unet(self, name, kind="UNet2DConditionModel", **config):
        """A UNet of random weights, and its folder."""
        torch.manual_seed(0)
        base = CONDITION if kind == "UNet2DConditionModel" else PLAIN
        unet = getattr(diffusers, kind)(**{**base, **config}).eval()
        folder = self.folder / name
        unet.save_pretrained(folder)
        return unet, folder

    def compare(self, got, expected, tolerance=2e-5):
        self.assertEqual(got.shape, expected.shape)
        difference = (got - expected).abs().max()
        self.assertLessEqual(difference, tolerance * expected.abs().max())


class Networks(Case):
    """What is traced, against diffusers' own modules."""

    def traced(self, folder, *arguments):
        out, model = self.export(
            folder, f"{folder.name}-out", "--prediction", "eps", "--unet-only", *arguments
        )
        return torch.jit.load(str(out / "unet.ts")), model

    @torch.no_grad()
    def test_further_channels(self):
        for name, channels, arguments, concat in (
            ("inpaint", 9, ("--concat", "inpaint"), {"channels": 5, "kind": "inpaint"}),
            ("depth", 5, ("--concat", "1"), {"channels": 1}),
            ("other", 8, ("--concat", "4"), {"channels": 4}),
        ):
            with self.subTest(name):
                unet, folder = self.unet(name, in_channels=channels)
                traced, model = self.traced(folder, *arguments)
                self.assertEqual(model["inputs"], {"concat": concat})
                self.assertEqual(model["sample"]["shape"], [4, 16, 16])
                for rows, height, width in ((1, 16, 24), (3, 17, 9)):
                    x, context = (
                        torch.randn(rows, channels, height, width),
                        torch.randn(rows, 7, 32),
                    )
                    timesteps = torch.linspace(1, 900, rows)
                    self.compare(traced(x, timesteps, context), unet(x, timesteps, context).sample)

    @torch.no_grad()
    def test_classes(self):
        vector, labels = torch.randn(3, 64), torch.tensor([2, 0, 9])
        both = ("UNet2DModel", "UNet2DConditionModel")
        cases = [
            *((kind, {"num_class_embeds": 10}, labels, {"classes": 10}) for kind in both),
            *((kind, {"class_embed_type": "timestep"}, labels, {}) for kind in both),
            *((kind, {"class_embed_type": "identity"}, vector, None) for kind in both),
        ]
        for embedding in ("projection", "simple_projection"):
            config = {"class_embed_type": embedding, "projection_class_embeddings_input_dim": 64}
            cases.append((both[1], config, vector, None))
        for i, (kind, config, given, described) in enumerate(cases):
            with self.subTest(kind, **config):
                unet, folder = self.unet(f"classes-{i}", kind, **config)
                traced, model = self.traced(folder)
                wanted = None if described is None else {"class_labels": described}
                self.assertEqual(model.get("inputs"), wanted)
                channels = model["sample"]["shape"][0]
                x, timesteps = torch.randn(3, channels, 16, 24), torch.tensor([1.0, 500, 900])
                text = [torch.randn(3, 7, 32)] if kind == both[1] else []
                expected = unet(x, timesteps, *text, class_labels=given).sample
                self.compare(traced(x, timesteps, *text, given), expected)
                other = traced(x, timesteps, *text, given.flip(0))
                self.assertGreater((other - expected).abs().max(), 1e-4)

    @torch.no_grad()
    def test_an_embedded_scale_of_guidance(self):
        sizes = {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        }
        for name, config in (("lcm", {}), ("lcm-sizes", sizes)):
            with self.subTest(name):
                unet, folder = self.unet(name, time_cond_proj_dim=24, **config)
                traced, model = self.traced(folder)
                self.assertEqual(model["inputs"], {"timestep_cond": {"size": 24}})
                self.assertEqual(model["defaults"], {"cfg": 1.0})
                x, timesteps = torch.randn(2, 4, 16, 24), torch.tensor([1.0, 900])
                context, scale = torch.randn(2, 7, 32), torch.randn(2, 24)
                y = [torch.randn(2, 22)] if config else []
                added = {"text_embeds": y[0][:, :16], "time_ids": y[0][:, 16:]} if y else None
                expected = unet(
                    x, timesteps, context, timestep_cond=scale, added_cond_kwargs=added
                ).sample
                self.compare(traced(x, timesteps, context, *y, scale), expected)

    @torch.no_grad()
    def test_a_refiners_five_numbers(self):
        unet, folder = self.unet(
            "refiner",
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=32 + 5 * 8,
        )
        traced, _ = self.traced(folder)
        x, timesteps, context = torch.randn(1, 4, 16, 24), torch.ones(1), torch.randn(1, 7, 32)
        y = torch.cat([torch.randn(1, 32), torch.tensor([[128.0, 192, 0, 0, 6]])], 1)
        added = {"text_embeds": y[:, :32], "time_ids": y[:, 32:]}
        expected = unet(x, timesteps, context, added_cond_kwargs=added).sample
        self.compare(traced(x, timesteps, context, y), expected)

    def test_what_is_not_known_is_refused(self):
        eps = ("--prediction", "eps")
        _, eight = self.unet("eight", in_channels=8)
        self.assertIn("takes 4 channels beside the 4 of the latent", self.mistake(eight, *eps))
        self.assertIn("needs its pipeline's VAE", self.mistake(eight, *eps, "--concat", "edit"))
        self.assertIn("must fit the UNet", self.mistake(eight, *eps, "--concat", "inpaint"))
        self.assertIn("must fit the UNet", self.mistake(eight, *eps, "--concat", "3"))
        # PaintByExample's nine channels stand in another order.
        _, nine = self.unet("nine", in_channels=9)
        other = self.edited(
            "inpaint", "by-example", "model_index.json", _class_name="PaintByExamplePipeline"
        )
        for arguments in ([nine, *eps], [other]):
            said = self.mistake(*arguments)
            self.assertIn("takes 5 channels beside the 4 of the latent", said)
            self.assertIn("--concat inpaint (a mask, then", said)
            self.assertIn("or --concat 5 for a tensor", said)
        _, both = self.unet("both", num_class_embeds=3, time_cond_proj_dim=8)
        self.assertIn("num_class_embeds and time_cond_proj_dim", self.mistake(both, *eps))
        config = "unet/config.json"
        self.assertIn(
            '"class_embed_type" must be absent or one of timestep,',
            self.mistake(self.edited("sd1", "odd", config, class_embed_type="odd")),
        )
        self.assertIn(
            "scale its latents by a factor alone",
            self.mistake(self.edited("edit", "shifted", "vae/config.json", shift_factor=0.1)),
        )


@unittest.skipUnless(SAMPLE, "SAG_SAMPLE_COMMAND names no sag-sample")
class Command(Case):
    """The command, without SAG, against diffusers' pipelines; both with Euler's steps."""

    STEPS, HEIGHT, WIDTH = 4, 72, 136
    PROMPT = "the red cat"

    def sample(self, *arguments, code=0):
        command = [SAMPLE, *map(str, arguments), "--device", "cpu", "--threads", "1"]
        run = subprocess.run(command, capture_output=True, text=True)
        self.assertEqual(run.returncode, code, run.stderr)
        return run.stdout if code == 0 else run.stderr

    def pictures(self):
        """A picture, and a mask of it: grey, and no edge on the edge of a latent cell."""
        random = numpy.random.default_rng(0)
        pixels = random.integers(0, 256, (self.HEIGHT, self.WIDTH, 3), dtype=numpy.uint8)
        mask = numpy.full((self.HEIGHT, self.WIDTH), 100, dtype=numpy.uint8)
        mask[13:51, 30:99] = 255
        mask[20:30, 40:60] = 150
        photo, mask = Image.fromarray(pixels), Image.fromarray(mask)
        photo.save(self.folder / "photo.png")
        mask.save(self.folder / "mask.png")
        return photo, mask

    def parts(self, kind):
        """What every pipeline of this folder is made of."""
        folder = self.pipeline(kind)
        return {
            "vae": diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
            "text_encoder": CLIPTextModel.from_pretrained(folder / "text_encoder"),
            "tokenizer": CLIPTokenizerFast.from_pretrained(folder / "tokenizer"),
            "unet": diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }

    def euler(self):
        return diffusers.EulerDiscreteScheduler(
            **export_model_test.make_tiny_pipeline.TABLE,
            timestep_spacing="leading",
            steps_offset=1,
        )

    def given_noise(self):
        """Noise, and the arguments that make the command start and step as diffusers does."""
        scheduler = self.euler()
        scheduler.set_timesteps(self.STEPS)
        torch.manual_seed(1)
        noise = torch.randn(2, 4, self.HEIGHT // 8, self.WIDTH // 8)
        start = noise * scheduler.init_noise_sigma / scheduler.sigmas[0]
        torch.save({"noise": start, "sigmas": scheduler.sigmas}, self.folder / "run.pt")
        arguments = ["--noise", f"{self.folder}/run.pt:noise"]
        return noise, [*arguments, "--sigmas", f"{self.folder}/run.pt:sigmas", "--no-sag"]

    def drawn(self, model, *arguments):
        out = self.folder / "drawn.pt"
        texts = ["--prompt", self.PROMPT, "--batch", "2"]
        self.sample("--model", model, *texts, *arguments, "--quiet", "--save-latent", out)
        return torch.load(out, weights_only=True)

    def test_inpainting(self):
        model, described = self.export(self.pipeline("inpaint"), "inpaint")
        self.assertEqual(described["inputs"], {"concat": {"channels": 5, "kind": "inpaint"}})
        photo, mask = self.pictures()
        parts = self.parts("inpaint")
        noise, arguments = self.given_noise()
        # The pipeline draws from the encoder's posterior; its mean is what can be compared.
        pixels = torch.tensor(numpy.array(photo)).permute(2, 0, 1)[None] / 127.5 - 1
        kept = torch.tensor(numpy.array(mask)) < 128
        with torch.no_grad():
            masked = parts["vae"].encode(pixels * kept).latent_dist.mode()
        pipeline = diffusers.StableDiffusionInpaintPipeline(**parts, scheduler=self.euler())
        pipeline.set_progress_bar_config(disable=True)
        expected = pipeline(
            [self.PROMPT] * 2,
            image=photo,
            mask_image=mask,
            masked_image_latents=masked * parts["vae"].config.scaling_factor,
            height=self.HEIGHT,
            width=self.WIDTH,
            latents=noise,
            num_inference_steps=self.STEPS,
            guidance_scale=5.0,
            output_type="latent",
        ).images
        given = ["--image", self.folder / "photo.png", "--mask", self.folder / "mask.png"]
        got = self.drawn(model, *arguments, "--cfg", "5", *given)
        self.compare(got, expected, 1e-4)
        # Tensors that say the same.
        cells = torch.nn.functional.interpolate((~kept).float()[None, None], got.shape[2:])
        masked = masked * parts["vae"].config.scaling_factor
        torch.save(torch.cat([cells, masked], 1), self.folder / "concat.pt")
        got = self.drawn(model, *arguments, "--cfg", "5", "--concat", self.folder / "concat.pt")
        self.compare(got, expected, 1e-4)
        # SAG sees the same channels, and guides.
        said = self.sample(
            *("--model", model, "--prompt", "a cat", "--steps", "2", *given),
            *("--out", self.folder / "out.png"),
        )
        self.assertIn("2 of 2 evaluations guided", said)
        self.assertNotIn("nothing is left of the start picture", said)

    def test_editing(self):
        model, described = self.export(self.pipeline("edit"), "edit")
        concat = described["inputs"]["concat"]
        self.assertEqual((concat["channels"], concat["kind"]), (4, "edit"))
        self.assertAlmostEqual(concat["scale"], 1 / 0.18215)
        photo, _ = self.pictures()
        noise, arguments = self.given_noise()
        pipeline = diffusers.StableDiffusionInstructPix2PixPipeline(
            **self.parts("edit"), scheduler=self.euler()
        )
        pipeline.set_progress_bar_config(disable=True)
        for image_cfg in (1.0, 1.5, 5.0, 7.0):
            with self.subTest(image_cfg=image_cfg):
                expected = pipeline(
                    [self.PROMPT] * 2,
                    image=photo,
                    latents=noise,
                    num_inference_steps=self.STEPS,
                    guidance_scale=5.0,
                    image_guidance_scale=image_cfg,
                    output_type="latent",
                ).images
                given = ["--image", self.folder / "photo.png", "--image-cfg", image_cfg]
                got = self.drawn(model, *arguments, "--cfg", "5", *given)
                self.compare(got, expected, 1e-4)

    def test_an_embedded_scale_of_guidance(self):
        model, _ = self.export(self.pipeline("lcm"), "lcm")
        parts = self.parts("lcm")
        noise, arguments = self.given_noise()
        # The pipeline of latent consistency models steps in another way; its unet is the same.
        scheduler = self.euler()
        scheduler.set_timesteps(self.STEPS)
        text = parts["tokenizer"](
            self.PROMPT, padding="max_length", max_length=77, return_tensors="pt"
        )
        embed = diffusers.LatentConsistencyModelPipeline.get_guidance_scale_embedding
        x = noise * scheduler.init_noise_sigma
        with torch.no_grad():
            context = parts["text_encoder"](text.input_ids)[0].expand(2, -1, -1)
            scale = embed(None, torch.tensor([4.3 - 1]), 24)
            for t in scheduler.timesteps:
                given = scheduler.scale_model_input(x, t)
                out = parts["unet"](given, t, context, timestep_cond=scale.expand(2, -1)).sample
                x = scheduler.step(out, t, x).prev_sample
        self.compare(self.drawn(model, *arguments, "--embedded-guidance", "4.3"), x, 1e-4)
        other = self.drawn(model, *arguments)
        self.assertGreater((other - x).abs().max(), 1e-3 * x.abs().max())

    def test_classes(self):
        unet, folder = self.unet("classes", "UNet2DModel", num_class_embeds=11)
        model, _ = self.export(folder, "classes-out", "--prediction", "eps")
        scheduler = self.euler()
        scheduler.set_timesteps(self.STEPS)
        torch.manual_seed(1)
        noise = torch.randn(2, 3, 16, 24)
        given = {"noise": noise, "sigmas": scheduler.sigmas}
        torch.save(given, self.folder / "classes.pt")

        @torch.no_grad()
        def loop(cfg, *labels):
            x = noise * scheduler.sigmas[0]
            for t, sigma, following in zip(
                scheduler.timesteps, scheduler.sigmas, scheduler.sigmas[1:], strict=False
            ):
                scaled = x / (sigma**2 + 1) ** 0.5
                outs = [unet(scaled, t, torch.full((2,), label)).sample for label in labels]
                out = outs[0] + (cfg - 1) * (outs[0] - outs[-1])
                x = x + out * (following - sigma)
            return x

        run = [f"--{name}={self.folder}/classes.pt:{name}" for name in given]
        run += ["--no-sag", "--quiet", "--save-latent", self.folder / "classes-drawn.pt"]
        for arguments, expected in (
            (["--class", "3"], loop(1.0, 3)),
            (["--class", "3", "--uncond-class", "10", "--cfg", "2.5"], loop(2.5, 3, 10)),
        ):
            self.sample("--model", model, *run, *arguments)
            got = torch.load(self.folder / "classes-drawn.pt", weights_only=True)
            self.compare(got, expected, 1e-4)
        # In the paper, too, SAG steers a class without an unconditional prediction.
        picture = ["--steps", "2", "--out", self.folder / "class.png"]
        said = self.sample("--model", model, "--class", "0", *picture)
        self.assertIn("2 of 2 evaluations guided", said)
        self.assertNotIn(", cfg", said)
        report = self.folder / "class.json"
        self.sample("--model", model, "--class", "0", "--json", report, "--steps", "1")
        self.assertEqual({run["cfg"] for run in json.loads(report.read_text())["runs"]}, {1.0})
        refused = ["--model", model, *picture]
        alone = [*refused, "--class", "0"]
        self.assertIn("--cfg 4 needs --uncond-class.", self.sample(*alone, "--cfg", "4", code=1))
        plain = [*alone, "--uncond-class", "10", "--unconditional", "1"]
        self.assertIn("here all are unconditional", self.sample(*plain, code=1))
        self.assertIn("give --class N, 0 to 10", self.sample(*refused, code=1))
        self.assertIn("0 to 10 for this", self.sample(*refused, "--class", "11", code=1))
        both = ("--class", "1", "--uncond-class", "11")
        self.assertIn("--uncond-class must be 0 to 10", self.sample(*refused, *both, code=1))

    def test_what_is_missing_or_too_much_is_said(self):
        photo, _ = self.pictures()
        photo.crop((0, 0, 64, 64)).save(self.folder / "small.png")
        photo, small = (self.folder / f"{name}.png" for name in ("photo", "small"))
        models = {kind: self.export(self.pipeline(kind), f"{kind}-said")[0] for kind in KINDS}
        torch.save(torch.zeros(1, 5, 8, 8), self.folder / "wrong.pt")
        wrong = self.folder / "wrong.pt"
        for kind, arguments, sentence in (
            ("inpaint", [], "repaints a part of a picture: give --image, and --mask"),
            ("inpaint", ["--image", photo], "repaints a part of a picture: give --image, and"),
            ("inpaint", ["--image", photo, "--mask", small], "the height and width of --image"),
            ("inpaint", ["--concat", wrong], "--concat must have shape"),
            ("edit", [], "edits a picture: give it with --image"),
            ("edit", ["--image", photo, "--image-cfg", "2", "--cfg", "1"], "other than 1"),
            ("sd1", ["--image-cfg", "2"], "--image-cfg is for models that edit"),
            ("sd1", ["--class", "1"], "--class is for models that draw classes"),
            ("sd1", ["--concat", wrong], "--concat is for models with further channels"),
            ("sd1", ["--embedded-guidance", "4"], "that guidance was distilled into"),
            ("sd1", ["--uncond-class", "4"], "--uncond-class needs --class"),
        ):
            with self.subTest(kind=kind, arguments=arguments):
                out = ["--save-latent", self.folder / "none.pt", "--steps", "1"]
                prompt = ["--prompt", "a cat"]
                said = self.sample("--model", models[kind], *prompt, *arguments, *out, code=1)
                self.assertIn(sentence, said)
                self.assertEqual(said.count("\n"), 1)
        for kind in KINDS:
            self.assertIn("fewest", self.sample("--model", models[kind], "--list-sites"))

    def test_a_mask_in_a_picture_for_any_model(self):
        """As the tensor that ComfyUI makes of it."""
        model, _ = self.export(self.pipeline("sd1"), "sd1-mask")
        _, mask = self.pictures()
        grey = torch.tensor(numpy.array(mask))[None, None] / 255
        size = (self.HEIGHT // 8, self.WIDTH // 8)
        torch.save(
            torch.nn.functional.interpolate(grey, size, mode="bilinear"), self.folder / "cells.pt"
        )
        given = ["--steps", "2", "--image", self.folder / "photo.png", "--denoise", "0.9"]
        got, expected = (
            self.drawn(model, *given, "--mask", self.folder / name)
            for name in ("mask.png", "cells.pt")
        )
        self.compare(got, expected)
        self.assertGreater((got - self.drawn(model, *given)).abs().max(), 1e-2)


class Compiled(Case):
    """One package with further channels, classes in int64 and no text."""

    @unittest.skipUnless(SAMPLE, "SAG_SAMPLE_COMMAND names no sag-sample")
    def test_it_draws_what_torchscript_draws(self):
        _, folder = self.unet("net", "UNet2DModel", num_class_embeds=5, in_channels=5)
        torch.save(torch.randn(2, 2, 16, 16), self.folder / "concat.pt")
        latents = []
        for form in (["torchscript"], ["aoti", "--rows", "1-4", "--size", "16x16"]):
            named = ["--prediction", "eps", "--concat", "2", "--format", *form]
            model, described = self.export(folder, form[0], *named)
            concat = {"channels": 2}
            self.assertEqual(
                described["inputs"], {"concat": concat, "class_labels": {"classes": 5}}
            )
            out = self.folder / f"{form[0]}.pt"
            command = [SAMPLE, "--model", model, "--class", "4", "--uncond-class", "0"]
            rest = ["--concat", self.folder / "concat.pt", "--save-latent", out, "--steps", "2"]
            subprocess.run([*command, *rest, "--quiet", "--device", "cpu"], check=True)
            latents.append(torch.load(out, weights_only=True))
        self.assertEqual(latents[0].shape, (2, 3, 16, 16))
        self.compare(latents[1], latents[0], 5e-5)


if __name__ == "__main__":
    unittest.main()
