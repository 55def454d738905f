"""Compiled models against plain ones: a program of its own, since dynamo cannot trace the tests' annotation checker."""

from __future__ import annotations

import copy

import torch

from tests.hooked_mamba.tiny import build, relative, tokens_for
from tests.kinds import MAMBA


def check(family: str, backend: str) -> None:
    """Values and gradients."""
    model = build(family).double()
    tokens = tokens_for(model, length=5)
    model(tokens)  # backends are imported at the first call, which dynamo need not follow
    compiled = torch.compile(copy.deepcopy(model), backend=backend)
    assert relative(compiled(tokens), model(tokens)) < 1e-12
    compiled(tokens, return_type="loss").backward()
    model(tokens, return_type="loss").backward()
    for (name, p), q in zip(model.named_parameters(), compiled.parameters(), strict=True):
        assert relative(q.grad, p.grad) < 1e-11, name
    hooked = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda v, hook: v * 2)])
    after = compiled._orig_mod.run_with_hooks(tokens, fwd_hooks=[("hook_embed", lambda v, hook: v * 2)])
    assert relative(after, hooked) < 1e-12, "the module under a compiled one takes hooks as ever"


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name in MAMBA:
        check(name, "eager")
    print("compiled models are equal")
