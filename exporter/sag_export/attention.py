"""Finds the attentions of a module, and marks those that sag may hook.

A marked attention calls torch.ops.sag.attention, which is scaled_dot_product_attention with the
name of its site. What is exported while it is marked keeps that call, where the library finds it.
"""

import contextlib

import torch
import torch.nn.functional as F

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
    """While active, F.scaled_dot_product_attention calls replacement(plain, ordinal, path, inputs,
    args, kwargs). The path and the inputs are those of the innermost module that runs; args begin
    with query, key and value."""
    plain = F.scaled_dot_product_attention
    running, count = [("", ())], 0

    def attention(query, key, value, *args, **kwargs):
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

    hooks = [hook for path, part in module.named_modules() for hook in watch(part, path)]
    # Replaced in torch.nn.functional, where diffusers, ComfyUI and most others look it up when they
    # call it.
    F.scaled_dot_product_attention = attention
    try:
        with without_fast_path():
            yield
    finally:
        F.scaled_dot_product_attention = plain
        for hook in hooks:
            hook.remove()
