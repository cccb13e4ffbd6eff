"""Finds the attentions of a module, and marks those that sag may hook.

A marked attention calls torch.ops.sag.attention, which is scaled_dot_product_attention with the
name of its site. What is exported while it is marked keeps that call, where the library finds it.
"""

import contextlib
import functools

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# As in src/attention/attention_op.cpp; tests/ops_library_test.py compares them.
SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False, "
    'str site="") -> Tensor'
)

# The declaration lives as long as this.
_library = None


def declare_op():
    """Declares torch.ops.sag.attention unless it exists already. The other way to get it is
    torch.ops.load_library("libsag_ops.so"), which must come first."""
    global _library
    if hasattr(torch.ops.sag, "attention"):
        return
    _library = torch.library.Library("sag", "DEF")
    _library.define(SCHEMA, alias_analysis="CONSERVATIVE")
    _library.impl("attention", _plain_attention, "CompositeExplicitAutograd")
    _library.impl("attention", _attention_meta, "Meta")


def _plain_attention(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    *,
    scale=None,
    enable_gqa=False,
    site="",
):
    out = torch.ops.aten.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out.contiguous()


def _attention_meta(query, key, value, *args, **kwargs):
    return query.new_empty((*query.shape[:-1], value.shape[-1]))


@contextlib.contextmanager
def marked(module, paths):
    """While active, the attention of the modules at these dotted paths calls
    torch.ops.sag.attention, with the path as its site. Gives a dict that a forward fills: path ->
    the place of that attention among all of the forward's.

    Raises ValueError at the end if the attention of a path did not run, or is not
    scaled_dot_product_attention.
    """
    declare_op()
    names = {path for path, _ in module.named_modules()}
    for path in paths:
        if path not in names:
            raise ValueError(f"there is no module '{path}' whose attention could be marked")
    ordinals = {}

    def attention(plain, ordinal, path, inputs, args, kwargs):
        if path not in paths:
            return plain(*args, **kwargs)
        ordinals.setdefault(path, ordinal)
        return torch.ops.sag.attention(*args, **kwargs, site=path)

    with _every_attention(module, attention):
        yield ordinals
    for path in paths:
        if path not in ordinals:
            raise ValueError(
                f"the module '{path}' has no scaled_dot_product_attention of its own that ran"
            )


def self_attentions(module, inputs):
    """Runs the module once. Returns its self-attentions in order of execution, as pairs: the place
    among all attentions of a forward, counted from 0, and the dotted path of the module.

    A module called attn1 attends to itself, one called attn2 does not. A module with another name
    does if it was given one tensor of tokens, and has as many keys as queries. (The library sees
    only the graph: there the queries and the keys must be projections of the same tensor.)
    """
    found = []

    def attention(plain, ordinal, path, inputs, args, kwargs):
        if _is_self_attention(path, inputs, *args[:2]):
            found.append((ordinal, path))
        return plain(*args, **kwargs)

    with torch.no_grad(), _every_attention(module, attention):
        module(*inputs)
    return found


def cross_attentions(module, inputs):
    """Runs the module once. Returns the dotted paths of its cross-attentions in order of execution:
    the attentions of modules called attn2 that do not attend to themselves."""
    found = {}

    def attention(plain, ordinal, path, inputs, args, kwargs):
        if path.rpartition(".")[2] == "attn2" and args[0].shape[-2] != args[1].shape[-2]:
            found[path] = ordinal
        return plain(*args, **kwargs)

    with torch.no_grad(), _every_attention(module, attention):
        module(*inputs)
    return list(found)


def without_second_prompt(module, inputs, paths):
    """Runs the module once, on a context of two prompts of the same length, and lets the attentions
    at these paths see the keys and values of the first one alone."""

    def attention(plain, ordinal, path, _, args, kwargs):
        if path in paths:
            query, key, value, *rest = args
            tokens = key.shape[-2] // 2
            args = (query, key[..., :tokens, :], value[..., :tokens, :], *rest)
        return plain(*args, **kwargs)

    with torch.no_grad(), _every_attention(module, attention):
        return module(*inputs)


def _is_self_attention(path, inputs, query, key):
    name = path.rpartition(".")[2]
    if name in ("attn1", "attn2"):
        return name == "attn1"
    tokens = {id(t) for t in inputs if isinstance(t, torch.Tensor) and t.dim() >= 3}
    return len(tokens) == 1 and query.shape[-2] == key.shape[-2]


@contextlib.contextmanager
def without_fast_path():
    """While active, torch.nn.MultiheadAttention and the modules built with it call
    scaled_dot_product_attention. In eval mode they would call one op for everything, and a trace of
    that has no attention that could be hooked."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _every_attention(module, replacement):
    """While active, every call of scaled_dot_product_attention, under whatever name the module
    holds it, becomes replacement(plain, ordinal, path, inputs, args, kwargs). The path and the
    inputs are those of the innermost module that runs; args begin with query, key and value.

    The attention in a scripted part is not seen: see scripted_attentions."""
    running, count = [("", ())], 0

    def attention(plain, query, key, value, *args, **kwargs):
        nonlocal count
        ordinal, count = count, count + 1
        path, inputs = running[-1]
        return replacement(plain, ordinal, path, inputs, (query, key, value, *args), kwargs)

    def watch(part, path):
        def enter(part, args, kwargs):
            running.append((path, (*args, *kwargs.values())))

        def leave(*_):
            running.pop()

        return (
            part.register_forward_pre_hook(enter, with_kwargs=True),
            part.register_forward_hook(leave, always_call=True),
        )

    # Those that torch.jit made take no hooks.
    parts = [p for p in module.named_modules() if not isinstance(p[1], torch.jit.ScriptModule)]
    hooks = [hook for path, part in parts for hook in watch(part, path)]
    try:
        with without_fast_path(), _Attentions(attention):
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Attentions(TorchFunctionMode):
    """Calls attention(plain, *args, **kwargs) where scaled_dot_product_attention is called. It
    does not matter how a caller came by that function: PyTorch itself asks the mode."""

    NAMES = (
        F.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    )

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in self.NAMES:
            return self.attention(func, *args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self._inside_multi_head():
                return func(*args, **kwargs)
        return func(*args, **kwargs)

    @contextlib.contextmanager
    def _inside_multi_head(self):
        """F.multi_head_attention_forward asks the mode in the place of everything that it calls,
        and it alone looks its attention up by name in torch.nn.functional."""
        plain = F.scaled_dot_product_attention
        F.scaled_dot_product_attention = functools.partial(self.attention, plain)
        try:
            yield
        finally:
            F.scaled_dot_product_attention = plain


def scripted_attentions(module):
    """The dotted paths of the parts that torch.jit made, and that have an attention: no Python runs
    in them, so it cannot be seen there, nor marked."""
    names = ("aten::scaled_dot_product_attention", "aten::_scaled_dot_product")
    parts = [
        (path, part)
        for path, part in module.named_modules()
        if isinstance(part, torch.jit.ScriptModule) and hasattr(part, "forward")
    ]
    found = [path for path, part in parts if any(n in str(part.inlined_graph) for n in names)]
    # Only the outermost ones.
    return [path for path in found if not any(path.startswith(f"{p}.") for p in found)]
