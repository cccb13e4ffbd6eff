"""attention.py and package.py of the exporter, without compiling anything."""

import functools
import pathlib
import tempfile
import unittest

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as by_name

import aoti_fixture
from sag_export.attention import marked, scripted_attentions, self_attentions
from sag_export.package import write_package, write_weights

MIDDLE = "middle_block.1.transformer_blocks.0.attn1"
INPUT = "input_blocks.1.1.transformer_blocks.0.attn1"

try:
    import diffusers
except ImportError:
    diffusers = None


def called_sites(module, inputs, paths):
    """The sites of sag::attention in the exported module."""
    with torch.no_grad(), marked(module, paths):
        program = torch.export.export(module, tuple(inputs.values()), strict=False)
    calls = [node for node in program.graph.nodes if node.target is torch.ops.sag.attention.default]
    return [call.kwargs["site"] for call in calls], program


class Mixed(nn.Module):
    """Attentions that are found by what they are given, and one that is not SDPA."""

    def __init__(self, own, other, unfused):
        super().__init__()
        self.own, self.other, self.unfused = own, other, unfused

    def forward(self, t, context):
        return self.unfused(self.other(self.own(t), context))


class Sdpa(nn.Module):
    def forward(self, t, context=None):
        context = t if context is None else context
        return F.scaled_dot_product_attention(t, context, value=context)


class Simple(nn.Module):
    def forward(self, t):
        return F.scaled_dot_product_attention(t, t, t)


class Unfused(nn.Module):
    def forward(self, t):
        return (t @ t.transpose(1, 2)).softmax(-1) @ t


class Holding(nn.Module):
    """Has the function under a name of its own."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, t):
        return self.function(t, t, t)


def by_default(query, key, value, function=by_name):
    return function(query, key, value)


# The ways in which a module may come by scaled_dot_product_attention.
NAMES = {
    "imported by name": lambda *qkv: by_name(*qkv),
    "looked up": lambda *qkv: F.scaled_dot_product_attention(*qkv),
    "held": by_name,
    "default argument": by_default,
    "partial": functools.partial(by_name, is_causal=True),
    "all by keyword": lambda q, k, v: by_name(value=v, key=k, query=q),
    "torch._C": torch._C._nn.scaled_dot_product_attention,
    "torch.ops": torch.ops.aten.scaled_dot_product_attention,
    "an overload": torch.ops.aten.scaled_dot_product_attention.default,
}


class Raising(nn.Module):
    def forward(self, t):
        F.scaled_dot_product_attention(t, t, t)
        raise RuntimeError("on purpose")


def mixed():
    return Mixed(Sdpa(), Sdpa(), Unfused()).eval(), (torch.randn(1, 4, 8), torch.randn(1, 4, 8))


class SelfAttentions(unittest.TestCase):
    def test_counts_all_attentions(self):
        unet = aoti_fixture.make_unet()
        found = self_attentions(unet, tuple(aoti_fixture.example().values()))
        self.assertEqual(found, [(0, INPUT), (2, MIDDLE)])

    def test_tells_them_by_their_inputs_where_names_do_not(self):
        module, inputs = mixed()
        self.assertEqual(self_attentions(module, inputs), [(0, "own")])

    @unittest.skipUnless(diffusers, "diffusers is not installed")
    def test_finds_those_of_diffusers(self):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=8,
            attention_head_dim=4,
            norm_num_groups=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        ).eval()
        found = self_attentions(
            unet, (torch.randn(1, 4, 8, 8), torch.ones(1), torch.randn(1, 3, 8))
        )
        middle = "mid_block.attentions.0.transformer_blocks.0.attn1"
        self.assertEqual(found[0], (0, "down_blocks.0.attentions.0.transformer_blocks.0.attn1"))
        self.assertIn((2, middle), found)
        inputs = {
            "sample": torch.randn(2, 4, 8, 8),
            "timestep": torch.ones(2),
            "context": torch.randn(2, 3, 8),
        }
        sites, _ = called_sites(unet, inputs, [middle])
        self.assertEqual(sites, [middle])


class Marked(unittest.TestCase):
    def test_exports_the_op_at_the_marked_sites_alone(self):
        unet, inputs = aoti_fixture.make_unet(), aoti_fixture.example()
        expected = unet(*inputs.values())
        for paths in ([], [MIDDLE], [INPUT, MIDDLE]):
            sites, program = called_sites(unet, inputs, paths)
            self.assertEqual(sites, paths)
            torch.testing.assert_close(program.module()(*inputs.values()), expected)

    def test_gives_places_and_leaves_the_values(self):
        unet, inputs = aoti_fixture.make_unet(), aoti_fixture.example()
        expected = unet(*inputs.values())
        with marked(unet, [MIDDLE]) as ordinals:
            torch.testing.assert_close(unet(*inputs.values()), expected)
        self.assertEqual(ordinals, {MIDDLE: 2})

    def test_passes_all_arguments_on(self):
        class Masked(nn.Module):
            def forward(self, t):
                mask = torch.ones(t.shape[-2], t.shape[-2], dtype=torch.bool).tril()
                grouped = F.scaled_dot_product_attention(
                    t, t[:, :1], t[:, :1], attn_mask=mask, enable_gqa=True
                )
                return grouped + F.scaled_dot_product_attention(t, t, t, is_causal=True, scale=0.3)

        module, t = Masked(), torch.randn(2, 4, 5, 8)
        expected = module(t)
        with marked(module, [""]):
            torch.testing.assert_close(module(t), expected)

    def test_marks_pytorchs_own_attention(self):
        """Which has a fast path that calls one op for everything."""

        class Own(nn.Module):
            def __init__(self):
                super().__init__()
                self.heads = nn.MultiheadAttention(8, 2, batch_first=True)

            def forward(self, t):
                return self.heads(t, t, t, need_weights=False)[0]

        module, inputs = Own().eval(), {"t": torch.randn(2, 4, 8)}
        with torch.no_grad():
            expected = module(*inputs.values())
        self.assertEqual(self_attentions(module, inputs.values()), [(0, "heads")])
        sites, program = called_sites(module, inputs, ["heads"])
        self.assertEqual(sites, ["heads"])
        with torch.no_grad():
            torch.testing.assert_close(program.module()(*inputs.values()), expected)
        self.assertTrue(torch.backends.mha.get_fastpath_enabled())

    def test_sees_the_function_under_any_name(self):
        for name, function in NAMES.items():
            module = nn.Sequential(Sdpa(), Holding(function), Sdpa()).eval()
            inputs = {"t": torch.randn(2, 4, 8)}
            expected = module(*inputs.values())
            with self.subTest(name):
                found = self_attentions(module, tuple(inputs.values()))
                self.assertEqual(found, [(0, "0"), (1, "1"), (2, "2")])
                sites, program = called_sites(module, inputs, ["1"])
                self.assertEqual(sites, ["1"])
                torch.testing.assert_close(program.module()(*inputs.values()), expected)
                with torch.no_grad(), marked(module, ["1"]) as ordinals:
                    traced = torch.jit.trace(module, *inputs.values(), check_trace=False)
                self.assertEqual(ordinals, {"1": 1})
                self.assertEqual(str(traced.inlined_graph).count("sag::attention"), 1)
                torch.testing.assert_close(traced(*inputs.values()), expected)

    def test_names_the_scripted_parts_whose_attention_it_cannot_see(self):
        scripted = torch.jit.script(nn.Sequential(Simple(), Simple()))
        traced = torch.jit.trace(Sdpa(), torch.randn(1, 4, 8))
        harmless = torch.jit.script(nn.Linear(8, 8))
        module = nn.Sequential(harmless, Sdpa(), nn.Sequential(scripted), traced)
        self.assertEqual(scripted_attentions(module), ["2.0", "3"])
        module = nn.Sequential(harmless, Sdpa())
        self.assertEqual(scripted_attentions(module), [])
        self.assertEqual(self_attentions(module, (torch.randn(1, 4, 8),)), [(0, "1")])

    def test_is_undone(self):
        plain = F.scaled_dot_product_attention
        module = Raising()
        with self.assertRaisesRegex(RuntimeError, "on purpose"), marked(module, [""]):
            module(torch.ones(1, 2, 4))
        self.assertIs(F.scaled_dot_product_attention, plain)
        self.assertFalse(module._forward_hooks or module._forward_pre_hooks)

    def test_refuses_what_it_cannot_mark(self):
        module, inputs = mixed()
        for path in ("unfused", "", "other.nothing"):
            refusal = self.assertRaisesRegex(ValueError, f"module '{path}'")
            with self.subTest(path), refusal, marked(module, [path]):
                module(*inputs)


class WritePackage(unittest.TestCase):
    def setUp(self):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        self.folder = pathlib.Path(folder.name)

    def refuses(
        self,
        pattern,
        unet=None,
        example=None,
        dims=None,
        name="unet.pt2",
        sites=(MIDDLE,),
        **options,
    ):
        example = example or aoti_fixture.example()
        dims = {**aoti_fixture.ranges(), **(dims or {})}
        with self.assertRaisesRegex(ValueError, pattern) as raised:
            write_package(
                unet or aoti_fixture.make_unet(),
                example,
                self.folder / name,
                sites=sites,
                dims=dims,
                **options,
            )
        self.assertNotIn("\n", str(raised.exception))
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_refuses_examples_that_do_not_fit(self):
        self.refuses(
            r"example's x must be \[1-4 4 6-24/2 6-24/2\], got \[2, 4, 13, 16\]",
            example={**aoti_fixture.example(), "x": torch.ones(2, 4, 13, 16)},
        )
        self.refuses("at least 2 where it may vary", example=aoti_fixture.example(rows=1))
        self.refuses("rows, must be the same", dims={"y": [2, aoti_fixture.FEATURES]})
        self.refuses("dims must be given for x, timesteps", dims={"z": [2]})
        self.refuses("multiples of 4", dims={"x": [(1, 4), 4, (6, 24, 4), (6, 24, 2)]})

    def test_refuses_modules_that_it_cannot_compile(self):
        self.refuses("eval mode", unet=aoti_fixture.make_unet().train())
        self.refuses("must end with .pt2", name="unet.pt")
        self.refuses("no module 'middle.0.0'", sites=["middle.0.0"])
        # It needs even sides.
        self.refuses(
            "cannot be exported with these dims", dims={"x": [(1, 4), 4, (6, 24), (6, 24)]}
        )

    def test_refuses_to_leave_out_what_is_not_a_weight(self):
        unet = aoti_fixture.make_unet()
        unet.offset = torch.linspace(0, 1, 4 * 16)
        unet.register_forward_pre_hook(
            lambda unet, args: (args[0] + unet.offset[:4, None, None], *args[1:])
        )
        self.refuses("neither", unet=unet, weights=True)

    def test_writes_weights_as_they_lie(self):
        unet = aoti_fixture.make_unet().to(memory_format=torch.channels_last)
        write_weights(unet, self.folder / "weights.pt")
        self.assertEqual([path.name for path in self.folder.iterdir()], ["weights.pt"])
        tensors = torch.load(self.folder / "weights.pt", weights_only=True)
        self.assertIs(type(tensors), dict)
        self.assertEqual(set(tensors), {*unet.state_dict(), "frequencies"})
        self.assertEqual(tensors["out.weight"].stride(), unet.out.weight.stride())
        self.assertTrue(torch.equal(tensors["out.weight"], unet.out.weight))


if __name__ == "__main__":
    unittest.main()
