#!/usr/bin/env python3
"""Makes the diffusers runs of tests/golden, to compare them with the files or to add one.

    tools/goldens/diffusers_runs.py                   # compares all of them, in a minute on a CPU
    tools/goldens/diffusers_runs.py --write diff_new  # writes runs/diff_new.pt

The parameters of a run are its entry in tests/golden/index.json: to add a run, write its entry
first. It needs what exporter/requirements.txt names.
"""

import argparse
import json
import pathlib
import sys

import diffusers
import torch

GOLDEN = pathlib.Path(__file__).resolve().parent.parent.parent / "tests/golden"
# Of the largest value: what repeated runs differ by, and a little more (tests/golden/README.md).
TOLERANCE = 2e-5


def make_unet():
    """The network of diffusers_tiny.ts, with its weights."""
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 16, 32, 48),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
        sample_size=16,
    )
    traced = torch.jit.load(str(GOLDEN / "diffusers_tiny.ts"))
    weights = {name.removeprefix("unet."): tensor for name, tensor in traced.state_dict().items()}
    unet.load_state_dict(weights)
    return unet.eval().requires_grad_(False)


class Recorder(diffusers.StableDiffusionSAGPipeline):
    """The pipeline, which writes down what it computes."""

    def record(self):
        self.token_sums, self.steps = [], []
        step = self.scheduler.step

        def recorded_step(noise_pred, t, latents, **options):
            result = step(noise_pred, t, latents, **options)
            self.steps[-1].update(
                latents_in=latents, noise_pred=noise_pred, latents_out=result.prev_sample
            )
            return result

        self.scheduler.step = recorded_step

    def sag_masking(self, original_latents, attn_map, map_size, t, eps):
        degraded = super().sag_masking(original_latents, attn_map, map_size, t, eps)
        heads = attn_map.unflatten(0, (len(original_latents), -1))
        self.token_sums.append(heads.mean(1).sum(1))
        # A copy: without CFG the pipeline adds to this tensor afterwards.
        self.steps.append(
            {"pred_x0": original_latents, "pred_eps": eps.clone(), "degraded_latents": degraded}
        )
        return degraded


def sample(run, unet, inputs, sag_scale):
    # null: an infinity, which is the default.
    config = {key: value for key, value in run["scheduler_config"].items() if value is not None}
    scheduler = getattr(diffusers, run["scheduler_class"]).from_config(config)
    parts = dict.fromkeys(
        ("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor")
    )
    pipeline = Recorder(**parts, unet=unet, scheduler=scheduler, requires_safety_checker=False)
    pipeline.set_progress_bar_config(disable=True)
    if sag_scale > 0:
        pipeline.record()
    height, width = run["latent_size"]
    samples = pipeline(
        height=height * pipeline.vae_scale_factor,
        width=width * pipeline.vae_scale_factor,
        num_inference_steps=run["steps"],
        guidance_scale=run["guidance_scale"],
        sag_scale=sag_scale,
        eta=run["eta"],
        latents=inputs["latents"].clone(),
        prompt_embeds=inputs["cond"],
        negative_prompt_embeds=inputs["uncond"],
        output_type="latent",
    ).images
    return pipeline, samples


def make_inputs(run):
    """One generator draws all of them, in this order."""
    generator = torch.Generator().manual_seed(run["seed"])
    batch = run["batch"]

    def draw(*shape):
        return torch.randn(batch, *shape, generator=generator)

    return {"latents": draw(4, *run["latent_size"]), "cond": draw(10, 32), "uncond": draw(10, 32)}


def noise_levels(run, scheduler):
    steps = scheduler.timesteps.long()
    alphas = scheduler.alphas_cumprod[steps]
    levels = {
        "timesteps": steps.float(),
        "alphas_cumprod": alphas,
        "sigmas": ((1 - alphas) / alphas).sqrt(),
    }
    if run["scheduler_class"] == "DDIMScheduler":
        earlier = steps - scheduler.config.num_train_timesteps // run["steps"]
        known = scheduler.alphas_cumprod[earlier.clamp(min=0)]
        last = scheduler.final_alpha_cumprod
        levels["alphas_cumprod_prev"] = torch.where(earlier >= 0, known, last)
    return levels


def make(run, unet):
    """The tensors of the run's file, with the parts of every step."""
    inputs = make_inputs(run)
    pipeline, samples = sample(run, unet, inputs, run["sag_scale"])
    tensors = {**inputs, "samples": samples, **noise_levels(run, pipeline.scheduler)}
    if run["sag_scale"] > 0:
        tensors["token_sums"] = torch.stack(pipeline.token_sums)
        for number, step in enumerate(pipeline.steps):
            tensors.update({f"step{number}.{name}": tensor for name, tensor in step.items()})
        tensors["no_sag.samples"] = sample(run, unet, inputs, 0.0)[1]
    return tensors


def difference(run, unet):
    """The largest one, of a tensor's largest value. The file may hold fewer steps."""
    expected, made = torch.load(GOLDEN / run["file"]), make(run, unet)
    missing = {name for name in made if not name.startswith("step")}.symmetric_difference(
        name for name in expected if not name.startswith("step")
    )
    if missing:
        sys.exit(f"diffusers_runs.py: {run['id']} differs in {', '.join(sorted(missing))}.")
    return max(
        ((made[name] - tensor).abs().max() / tensor.abs().max()).item()
        for name, tensor in expected.items()
    )


def compare(runs, unet):
    for run in runs:
        if run.get("error"):
            print(f"{run['id']}: skipped, the reference throws")
            continue
        found = difference(run, unet)
        print(f"{run['id']}: {found:.1e}")
        if not found <= TOLERANCE:
            sys.exit(f"diffusers_runs.py: {run['id']} differs by more than {TOLERANCE}.")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", metavar="ID", help="the id of an entry of index.json")
    options = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    runs = json.loads((GOLDEN / "index.json").read_text())["diffusers_runs"]
    unet = make_unet()
    if options.write is None:
        compare(runs, unet)
        return
    run = next((run for run in runs if run["id"] == options.write), None)
    if run is None:
        sys.exit(f'diffusers_runs.py: index.json has no run "{options.write}".')
    # The first step is enough for the tests.
    tensors = {
        name: tensor.contiguous()
        for name, tensor in make(run, unet).items()
        if not name.startswith("step") or name.startswith("step0.")
    }
    torch.save(tensors, GOLDEN / run["file"])


if __name__ == "__main__":
    main()
