"""Every site of every family edited, forward and backward, against the equations with the same edit."""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.hooked_mamba.hybrids import reference
from tests.hooked_mamba.hybrids.test_equations import error, everything
from tests.hooked_mamba.hybrids.tiny import CASES, SOME, Tiny, tiny, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")

# Editing -------------------------------------------------------------------------------------------------------------


def edit_of(name: str, site) -> Callable[[np.ndarray], np.ndarray]:
    """Noise, or for indices other experts; a divisor stays positive, -inf stays."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))

    def edit(value: np.ndarray) -> np.ndarray:
        if site.row.integer:
            return (value + 1) % (61 if name == "hook_tokens" else site.sizes["X"])
        noise = rng.standard_normal(value.shape)
        if name.endswith(("hook_scale", "hook_dt", "hook_A_bar")):
            return value * (0.5 + np.abs(noise))
        return value * 1.3 + 0.5 * noise

    return edit


def check_edit(one: Tiny, name: str, plain: Tensor | None, tokens: Tensor) -> None:
    """`plain`: the logits without the edit, which must be others; None: they may be the same."""
    made: list[np.ndarray] = []

    def hook(value: Tensor, hook) -> Tensor:
        made.append(edit_of(name, one.model.site(name))(value.numpy()))
        return torch.from_numpy(made[0])

    with one.model.hooks(fwd_hooks=[(name, hook)]):
        got, cache = everything(one.model, tokens)
    expected = reference.forward(one.config, one.weights, tokens.numpy(), {name: lambda v: made[0]})
    assert plain is None or relative(got, plain) > 1e-9, f"an edit of {name} has no effect: the test shows nothing"
    assert relative(got, expected.logits) < 1e-10, name
    worst = max((error(value, expected.values[n]), n) for n, value in cache.items())
    assert worst < (1e-10, ""), f"{worst[1]} is off by {worst[0]:.1e} when {name} is edited"


def one_of_each_kind(names: list[str]) -> list[str]:
    """The first block that has a site, and the top."""
    seen: dict[str, str] = {}
    for name in names:
        kind = name.split(".", 2)[2] if name.startswith("blocks.") else name
        seen.setdefault(kind, name)
    return list(seen.values())


@pytest.mark.parametrize("case", SOME)
def test_an_edit_at_each_kind_of_site_equals_recomputation(case):
    one, tokens = tiny(case), tokens_for(length=4, seed=1)
    plain = one.model(tokens)
    for name in one_of_each_kind(list(one.model.hook_dict)):
        check_edit(one, name, plain, tokens)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_an_edit_at_every_site_equals_recomputation(case):
    one, tokens = tiny(case), tokens_for(length=6, seed=1)
    plain = one.model(tokens)
    for name in one.model.hook_dict:
        check_edit(one, name, plain, tokens)


@pytest.mark.parametrize("case", CASES)
def test_identity_hooks_change_nothing(case):
    model, tokens = tiny(case).model, tokens_for(length=6)
    with model.hooks(fwd_hooks=[(lambda name: True, lambda value, hook: value)]):
        edited = model(tokens)
    assert relative(edited, model(tokens)) < 1e-13


# Gradients -----------------------------------------------------------------------------------------------------------


def loss(logits: np.ndarray, tokens: np.ndarray) -> float:
    logits = logits[:, :-1]
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
    return float((log_z - chosen).mean())


@pytest.mark.parametrize("case", SOME)
def test_gradients_at_every_kind_of_site_equal_differences(case):
    """Central differences of the reference, along one direction a site: no routing changes within so small a step."""
    one, tokens = tiny(case), tokens_for(length=4, seed=2)
    names = [n for n in one_of_each_kind(list(one.model.hook_dict)) if not one.model.site(n).row.integer]
    grads: dict[str, Tensor] = {}
    keep = [(n, lambda g, hook: grads.__setitem__(hook.name, g.clone())) for n in names]
    with one.model.hooks(bwd_hooks=keep):
        one.model(tokens, return_type="loss").backward()
    rng = np.random.default_rng(0)
    plain = reference.forward(one.config, one.weights, tokens.numpy()).values
    for name in names:
        size = np.abs(plain[name][np.isfinite(plain[name])]).mean()
        direction = rng.standard_normal(one.model.site(name).shape(2, 4)) * min(1, size)
        sides = []
        for step in (1e-6, -1e-6):

            def move(v: np.ndarray, step: float = step, direction: np.ndarray = direction) -> np.ndarray:
                return v + step * np.where(np.isneginf(v), 0, direction)

            logits = reference.forward(one.config, one.weights, tokens.numpy(), {name: move}).logits
            sides.append(loss(logits, tokens.numpy()))
        expected = (sides[0] - sides[1]) / 2e-6
        if name.endswith("hook_router_scores") and name not in grads:
            assert expected == 0  # they only choose
            continue
        grad = grads[name].numpy()
        got = (np.where(np.isfinite(grad), grad, 0) * direction).sum()
        terms = max(np.abs(grad * direction).sum(), 1e-3)
        assert abs(got - expected) < 1e-6 * terms, f"{name}: {got} against {expected}"
        assert np.abs(grad).sum() > 0, f"{name} gets no gradient"
