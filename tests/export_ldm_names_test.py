"""The names of checkpoints in one file, against diffusers' own conversion of such files."""

import unittest

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders import single_file_utils as theirs
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sag_export import ldm_names

UNETS = {
    "one": {
        "cross_attention_dim": 24,
        "attention_head_dim": 4,
        "block_out_channels": (32, 64, 64, 64),
    },
    "two": {
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4, 4, 4),
        "block_out_channels": (32, 64, 64, 64),
        "use_linear_projection": True,
        "in_channels": 9,
    },
    "xl": {
        "cross_attention_dim": 24,
        "attention_head_dim": (2, 4, 4),
        "block_out_channels": (32, 64, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}


def stored_tensor(stored, parameter, file):
    """Puts a parameter into `file` as the name says it is stored."""
    value = parameter.detach()
    value = value.T if stored.transposed else value
    if stored.rows:
        whole = file.setdefault(
            stored.key, torch.full((3 * len(value), *value.shape[1:]), torch.nan)
        )
        whole[slice(*stored.rows)] = value
    else:
        assert stored.key not in file
        file[stored.key] = value.clone()


def as_file(module, names):
    file = {}
    for name, parameter in module.named_parameters():
        stored_tensor(names[name], parameter, file)
    for key, value in file.items():
        assert not value.isnan().any(), key
    return file


class Names(unittest.TestCase):
    def check_converted(self, module, converted):
        state = dict(module.named_parameters())
        self.assertEqual(set(converted) - {"text_model.embeddings.position_ids"}, set(state))
        for name, value in state.items():
            self.assertTrue(torch.equal(converted[name].reshape(value.shape), value), name)

    def test_unets(self):
        for kind, config in UNETS.items():
            with self.subTest(kind):
                torch.manual_seed(0)
                unet = UNet2DConditionModel(**config)
                file = as_file(unet, ldm_names.unet_names(unet))
                self.check_converted(
                    unet, theirs.convert_ldm_unet_checkpoint(file, dict(unet.config))
                )

    def test_vae(self):
        torch.manual_seed(0)
        vae = AutoencoderKL(
            block_out_channels=(32, 64, 64, 64),
            layers_per_block=2,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
        )
        file = as_file(vae, ldm_names.vae_names(vae))
        self.check_converted(vae, theirs.convert_ldm_vae_checkpoint(file, dict(vae.config)))

    def test_open_clip(self):
        torch.manual_seed(0)
        config = CLIPTextConfig(
            hidden_size=32,
            intermediate_size=64,
            projection_dim=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            vocab_size=100,
        )
        model = CLIPTextModelWithProjection(config)
        prefix = "conditioner.embedders.1.model"
        file = as_file(model, ldm_names.open_clip_names(model, prefix))
        file[f"{prefix}.logit_scale"] = torch.tensor(1.0)
        converted = theirs.convert_open_clip_checkpoint(model, file, prefix=f"{prefix}.")
        self.check_converted(model, converted)

    def test_clip(self):
        config = CLIPTextConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4
        )
        model = CLIPTextModel(config)
        prefix = "cond_stage_model.transformer"
        file = as_file(model, ldm_names.clip_names(model, prefix))
        converted = theirs.convert_ldm_clip_checkpoint(file)
        self.check_converted(model, converted)


if __name__ == "__main__":
    unittest.main()
