"""Every site of RWKV-7 and gated DeltaNet: read, edited forwards and backwards, held against the equations."""

from __future__ import annotations

import re
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_mamba import HookPoint
from tests.hooked_mamba import reference
from tests.hooked_mamba.recurrent.models import KINDS, equations, everything, model_of, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-12
LENGTH = 6
SITES = {kind: [name for name in model_of(kind).hook_dict if name != "hook_tokens"] for kind in KINDS}
STATES = [f"blocks.{layer}.mixer.hook_h.{t}" for layer in (0, 1) for t in (0, 2, LENGTH - 1, -2)]
CASES = [(kind, name) for kind in KINDS for name in [*SITES[kind], *STATES]]


@pytest.fixture(autouse=True)
def _no_hooks_left():
    yield
    for kind in KINDS:
        assert not any(point.wanted for point in model_of(kind).hook_points())


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_point_is_declared(kind):
    model = model_of(kind)
    assert {name for name, module in model.named_modules() if isinstance(module, HookPoint)} == set(model.hook_dict)
    for name in model.hook_dict:
        row = model.site(name).row
        assert row.text
        assert bool(row.single) == (row.kind == "state")


@pytest.mark.parametrize("kind", KINDS)
def test_every_cached_site_equals_the_equations(kind):
    model, tokens = model_of(kind), tokens_for(length=LENGTH, seed=3)
    expected = equations(model, tokens)
    logits, cache = everything(model, tokens)
    assert relative(logits, expected.logits) < EXACT
    assert set(cache) == set(expected.sites)
    for name, value in expected.sites.items():
        assert relative(cache[name], value) < EXACT, name
        assert tuple(cache[name].shape) == model.site(name).shape(2, LENGTH), name


@pytest.mark.parametrize("kind", KINDS)
def test_default_cache_leaves_out_what_is_large(kind):
    model = model_of(kind)
    _, cache = model.run_with_cache(tokens_for())
    left_out = {re.sub(r".*hook_", "", name) for name in set(model.hook_dict) - set(cache)}
    assert left_out == {"Bx", "h"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_dtypes(kind, dtype):
    """In half precision decays, states, norms' quotients, the residual stream's scales and logits are float32; hooks in
    line change no dtype."""
    model = type(model_of(kind))(model_of(kind).cfg, seed=0).to(dtype)
    _, cache = everything(model, tokens_for(length=LENGTH))
    for name, value in cache.items():
        if name in ("hook_tokens", "hook_logits") or "resid" in name:
            continue
        wide = torch.float32 if model.site(name).row.wide else dtype
        assert value.dtype == wide, name
    with model.hooks(fwd_hooks=[(name, lambda v, hook: v) for name in cache if name != "hook_tokens"]):
        _, edited = everything(model, tokens_for(length=LENGTH))
    assert {n: v.dtype for n, v in edited.items()} == {n: v.dtype for n, v in cache.items()}


# Editing -------------------------------------------------------------------------------------------------------


def draw_edit(name: str):
    """An edit as numpy and as a hook, the same numbers in both: divisors and strengths are scaled, others moved too."""
    rng, draw = np.random.default_rng(zlib.crc32(name.encode())), {}

    def edit(value: np.ndarray) -> np.ndarray:
        if value.shape not in draw:
            draw[value.shape] = rng.standard_normal(value.shape)
        noise = draw[value.shape]
        if name.endswith(("hook_scale", "hook_dt")):
            return value * (1 + 0.5 * np.abs(noise))
        return value * 1.3 + noise * 0.3

    return edit, lambda value, hook: torch.from_numpy(edit(value.detach().numpy()))


def check_edits(kind: str, names: list[str], tokens: Tensor) -> None:
    """Logits and every site, edited run against edited equations."""
    model, edits = model_of(kind), {name: draw_edit(name) for name in names}
    positive = {re.sub(r"\.-(\d+)$", lambda m: f".{LENGTH - int(m[1])}", n): edit for n, (edit, _) in edits.items()}
    expected, plain = equations(model, tokens, positive), equations(model, tokens)
    logits, cache = everything(model, tokens, fwd_hooks=[(name, hook) for name, (_, hook) in edits.items()])
    assert relative(logits, expected.logits) < EXACT
    assert np.abs(expected.logits - plain.logits).max() > 1e-6, "the edit has no effect: the test shows nothing"
    for name, value in expected.sites.items():
        if name in cache:
            assert relative(cache[name], value) < EXACT, name


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_an_edit_is_the_equations_with_that_edit(kind, name):
    check_edits(kind, [name], tokens_for(length=LENGTH, seed=5))


COMBINED = (
    ("h.1", "h.3"),
    ("h.2", "h"),
    ("h.2", "recall"),
    ("recall", "Bx"),
    ("Bx", "h.1", "h"),
    ("recall", "h"),
)


@pytest.mark.parametrize("sites", COMBINED, ids=" ".join)
@pytest.mark.parametrize("kind", KINDS)
def test_edits_together(kind, sites):
    names = [f"blocks.{layer}.mixer.hook_{site}" for layer in (0, 1) for site in sites]
    check_edits(kind, names, tokens_for(length=LENGTH, seed=6))


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_edit_travels_and_later_removals_read_it(kind):
    """Beside the linear part that the decay alone would carry on, recall changes: the loop is closed."""
    model, tokens = model_of(kind), tokens_for(rows=1, length=LENGTH)
    name = "blocks.0.mixer.hook_h.2"
    _, plain = everything(model, tokens)
    _, edited = everything(model, tokens, fwd_hooks=[(name, lambda h, hook: h + 1)])
    changed = (edited["blocks.0.mixer.hook_recall"] - plain["blocks.0.mixer.hook_recall"]).abs().amax((0, 2, 3))
    assert (changed[:3] == 0).all()
    assert (changed[3:] > 1e-6).all()


@pytest.mark.parametrize("kind", KINDS)
def test_an_edit_of_the_stacked_states_is_local(kind):
    model, tokens, site = model_of(kind), tokens_for(rows=1, length=LENGTH), "blocks.0.mixer.hook_h"

    def double(h: Tensor, hook) -> Tensor:
        return torch.cat([h[:, :2], 2 * h[:, 2:3], h[:, 3:]], 1)

    _, plain = everything(model, tokens)
    _, edited = everything(model, tokens, fwd_hooks=[(site, double)])
    y, y_edited = (cache["blocks.0.mixer.hook_y_scan"] for cache in (plain, edited))
    assert relative(y_edited[:, 2], 2 * y[:, 2]) < EXACT
    others = [t for t in range(LENGTH) if t != 2]
    assert relative(y_edited[:, others], y[:, others]) < EXACT
    with model.hooks(fwd_hooks=[(site, double)]):
        _, after_edit = model(tokens, return_state=True)
    _, after = model(tokens, return_state=True)
    assert relative(after_edit[0].ssm, after[0].ssm) < EXACT, "the carried state is not what is read out"


@pytest.mark.parametrize("kind", KINDS)
def test_unedited_values_given_to_the_open_loop_change_nothing(kind):
    model, tokens = model_of(kind), tokens_for(length=LENGTH)
    names = [n for n in SITES[kind] if n.endswith(("hook_recall", "hook_delta", "hook_Bx"))]
    hooked = model.run_with_hooks(tokens, fwd_hooks=[(name, lambda v, hook: v) for name in names])
    assert relative(hooked, model(tokens)) < EXACT


# Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_read_at_every_site_is_the_derivative(kind):
    """At hook_h that of the local read-out, at hook_h.{t} and hook_recall what an edit there would do."""
    model, tokens = model_of(kind), tokens_for(length=LENGTH, seed=1)
    rng, grads = np.random.default_rng(0), {}
    names = [*SITES[kind], *(f"blocks.{layer}.mixer.hook_h.{t}" for layer in (0, 1) for t in (0, 2, LENGTH - 1))]
    special = [n for n in names if re.search(r"hook_(recall|delta|Bx|h)$", n)]
    for group in ([n for n in names if n not in special], *([n] for n in special)):

        def keep(grad: Tensor, hook) -> None:
            grads[hook.name] = grad.numpy().copy()

        loss = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(name, keep) for name in group])
        loss.backward()
        for name in group:
            direction = rng.standard_normal(grads[name].shape)
            terms = grads[name] * direction
            step = 1j * reference.STEP * direction
            moved = equations(model, tokens, {name: lambda value, step=step: value + step})
            expected = float(reference.derivative(reference.cross_entropy(moved.logits, tokens.numpy())))
            assert abs(terms.sum() - expected) <= EXACT * np.abs(terms).sum() + 1e-17, name
            dead = name.endswith((f"hook_h.{LENGTH - 1}", "hook_logits"))
            assert np.abs(terms).sum() > 0 or dead, f"{name} gets no gradient"
