"""Every site of both models: read, edited forward and backward, and held against the equations with the same edit."""

from __future__ import annotations

import functools
import math
import re
import zlib

import numpy as np
import pytest
import torch
from torch import Tensor

from hooked_mamba import HookPoint, ops
from hooked_mamba.hooks.names import match_names
from tests.hooked_mamba import reference
from tests.hooked_mamba.tiny import FAMILIES, arrays, build, relative, tokens_for
from tests.kinds import MAMBA

pytestmark = pytest.mark.usefixtures("fast")
EXACT = 1e-10
LENGTH = 6
FLOAT_SITES = {
    family: [name for name in build(family).hook_dict if name != "hook_tokens"] for family in ("mamba", "mamba2-groups")
}
CASES = [(family, name) for family, names in FLOAT_SITES.items() for name in names]
STATE_CASES = [
    (family, f"blocks.{layer}.mixer.hook_h.{t}")
    for family in FLOAT_SITES
    for layer in (0, 1)
    for t in (0, 2, LENGTH - 1, -1, -LENGTH + 1)
]

_models: dict = {}


def model_of(family: str):
    """One float64 model a family; every test leaves it without hooks."""
    if family not in _models:
        _models[family] = build(family, seed=11).double().requires_grad_(False)
    return _models[family]


@pytest.fixture(autouse=True)
def _no_hooks_left():
    yield
    for model in _models.values():
        assert not any(point.wanted for point in model.hook_points())


def equations(model, tokens: Tensor, edits=None, **changes) -> reference.Pass:
    return reference.forward(model.cfg, arrays(model.state_dict()) | changes, tokens.numpy(), edits)


@functools.lru_cache(maxsize=8)
def _unedited(model, tokens: tuple) -> reference.Pass:
    return equations(model, torch.tensor(tokens))


def unedited(model, tokens: Tensor) -> reference.Pass:
    return _unedited(model, tuple(map(tuple, tokens.tolist())))


def everything(model, tokens: Tensor, **kwargs):
    """Logits and every site there is, single states included."""
    states = [f"blocks.{i}.mixer.hook_h.{t}" for i in range(model.cfg.n_layers) for t in range(tokens.shape[1])]
    return model.run_with_cache(tokens, names_filter=[*model.hook_dict, *states], **kwargs)


# The table ---------------------------------------------------------------------------------------------------

DESIGN = {
    "mamba": """hook_embed hook_resid_pre norm.hook_scale norm.hook_normalized norm.hook_out hook_in_proj hook_x_pre
        hook_z hook_conv hook_x hook_x_proj hook_dt_low hook_dt_pre hook_dt hook_B hook_C hook_A_bar hook_B_bar hook_Bx
        hook_h hook_y_scan hook_skip hook_y hook_gate hook_y_gated hook_out_proj hook_resid_post ln_final.hook_scale
        ln_final.hook_normalized ln_final.hook_out hook_logits""",
    "mamba2-groups": """hook_embed hook_resid_pre norm.hook_scale norm.hook_normalized norm.hook_out hook_in_proj
        hook_x_pre hook_z hook_conv hook_x hook_dt_pre hook_dt hook_B hook_C hook_A_bar hook_B_bar hook_Bx hook_h
        hook_y_scan hook_skip hook_y hook_gate hook_y_gated mixer.norm.hook_scale mixer.norm.hook_normalized
        mixer.norm.hook_out hook_out_proj hook_resid_post ln_final.hook_scale ln_final.hook_normalized
        ln_final.hook_out hook_logits""",
}
"""The sites of the design, in computing order."""

OF_BLOCK = {"hook_resid_pre", "hook_resid_post"}
OF_TOP = {"hook_embed", "hook_logits", "ln_final.hook_scale", "ln_final.hook_normalized", "ln_final.hook_out"}


@pytest.mark.parametrize("family", DESIGN)
def test_the_sites_are_those_of_the_design(family):
    model = model_of(family)
    names, expected = DESIGN[family].split(), ["hook_tokens"]
    before = [n for n in names if n in OF_TOP and names.index(n) == 0]
    after = [n for n in names if n in OF_TOP and n not in before]
    expected += before
    for i in range(model.cfg.n_layers):
        for name in names:
            if name not in OF_TOP:
                outside = name in OF_BLOCK or "." in name
                expected.append(f"blocks.{i}.{name if outside else 'mixer.' + name}")
    assert list(model.hook_dict) == expected + after


@pytest.mark.parametrize("family", DESIGN)
def test_every_hook_point_is_declared(family):
    model = model_of(family)
    points = {name for name, module in model.named_modules() if isinstance(module, HookPoint)}
    assert points == set(model.hook_dict)
    for name in points:
        row = model.site(name).row
        assert row.text
        assert name.endswith(row.name)
        assert bool(row.single) == (row.kind == "state")


@pytest.mark.parametrize("family", FAMILIES)
def test_shapes(family):
    model = build(family)
    tokens = tokens_for(model, rows=2, length=LENGTH)
    _, cache = everything(model, tokens)
    for name, value in cache.items():
        assert tuple(value.shape) == model.site(name).shape(2, LENGTH), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", ["mamba", "falcon", "mamba2-groups"])
def test_dtypes(family, dtype):
    """In half precision the residual stream, norms' quotients, dt, A_bar, B_bar, Bx, h and logits are float32."""
    model = build(family).to(dtype)
    _, cache = everything(model, tokens_for(model, length=LENGTH))
    for name, value in cache.items():
        wide = torch.float32 if dtype == torch.bfloat16 and model.site(name).row.wide else dtype
        assert value.dtype == (torch.int64 if name == "hook_tokens" else wide), name
    hooks_in_line = [(name, lambda v, hook: v) for name in cache.keys() if name != "hook_tokens"]  # noqa: SIM118
    with model.hooks(fwd_hooks=hooks_in_line):
        _, edited = everything(model, tokens_for(model, length=LENGTH))
    assert {n: v.dtype for n, v in edited.items()} == {n: v.dtype for n, v in cache.items()}


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_default_cache_leaves_out_what_is_large(family):
    model = model_of(family)
    _, cache = model.run_with_cache(tokens_for(model))
    left_out = {re.sub(r".*hook_", "", name) for name in set(model.hook_dict) - set(cache)}
    assert left_out == ({"A_bar", "B_bar", "Bx", "h"} if family == "mamba" else {"Bx", "h"})
    assert [n for n in model.hook_dict if model.site(n).row.is_default] == list(cache)


# Reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cached_site_equals_the_equations(family):
    model = model_of(family)
    tokens = tokens_for(model, length=LENGTH, seed=3)
    expected = equations(model, tokens)
    logits, cache = everything(model, tokens)
    assert relative(logits, expected.logits) < EXACT
    assert set(cache) == set(expected.sites)
    for name, value in expected.sites.items():
        assert relative(cache[name], value) < EXACT, name


# Editing forward ---------------------------------------------------------------------------------------------


def draw_edit(name: str, kind: str):
    """An edit of one kind, as numpy and as a hook, the same numbers in both."""
    rng = np.random.default_rng(zlib.crc32(f"{name} {kind}".encode()))
    draw: dict[tuple[int, ...], np.ndarray] = {}

    def edit(value: np.ndarray) -> np.ndarray:
        if value.shape not in draw:
            draw[value.shape] = rng.standard_normal(value.shape)
        noise = draw[value.shape]
        if kind == "scale":
            return value * 1.3
        if kind == "zero a position":
            value = value.copy()
            value[:, value.shape[1] // 2] = 0
            return value
        if kind == "one element":
            value = value.copy()
            value[tuple(n // 2 for n in value.shape)] += 0.5
            return value
        # A scale is a divisor and a step size is positive; elsewhere anything goes.
        return np.abs(noise) + 0.5 if name.endswith(("hook_scale", "hook_dt", "hook_A_bar")) else noise

    def hook(value: Tensor, hook) -> Tensor:
        return torch.from_numpy(edit(value.detach().numpy()))

    return edit, hook


KINDS = ("scale", "zero a position", "one element", "replace")


def kind_for(name: str) -> str:
    """Over sites and layers each kind comes up about as often. A divisor is never zeroed."""
    kinds = [k for k in KINDS if not (k == "zero a position" and name.endswith("hook_scale"))]
    return kinds[zlib.crc32(name.encode()) % len(kinds)]


def check_edits(model, tokens: Tensor, edits: dict) -> None:
    """Logits and every site, edited run against edited equations."""
    expected = equations(model, tokens, {name: edit for name, (edit, _) in edits.items()})
    plain = unedited(model, tokens)
    hooks = [(name, hook) for name, (_, hook) in edits.items()]
    logits, cache = everything(model, tokens, fwd_hooks=hooks)
    assert relative(logits, expected.logits) < EXACT
    assert np.abs(expected.logits - plain.logits).max() > 1e-6, "the edit has no effect: the test shows nothing"
    for name, value in expected.sites.items():
        if name in cache:
            assert relative(cache[name], value) < EXACT, name
    first = next(name for name in expected.sites if name in edits)
    earlier = list(expected.sites)[: list(expected.sites).index(first)]
    for name in earlier:
        assert np.array_equal(expected.sites[name], plain.sites[name]), f"{name} comes before {first}"


@pytest.mark.parametrize(("family", "name"), CASES)
def test_an_edit_changes_all_that_follows_as_the_equations_say(family, name):
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH, seed=5)
    check_edits(model, tokens, {name: draw_edit(name, kind_for(name))})


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "name"), CASES + STATE_CASES)
def test_every_kind_of_edit_at_every_site(family, name, kind):
    if kind == "zero a position" and name.endswith("hook_scale"):
        pytest.skip("a divisor of zero")
    if kind == "one element" and name.endswith("hook_dt_pre"):
        pytest.skip("the clamp may hide one element")
    model = model_of(family)
    for seed in range(3):
        check_edits(model, tokens_for(model, rows=2, length=LENGTH, seed=seed), {name: draw_edit(name, kind)})


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_edits_at_all_sites_at_once(family):
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH, seed=6)
    names = [*FLOAT_SITES[family], "blocks.0.mixer.hook_h.1", "blocks.1.mixer.hook_h.4", "blocks.1.mixer.hook_h.3"]
    check_edits(model, tokens, {name: draw_edit(name, "one element") for name in names})


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_tokens_are_a_site_too(family):
    model = model_of(family)
    tokens = tokens_for(model)
    other = (tokens + 1) % model.cfg.d_vocab
    swapped = model.run_with_hooks(tokens, fwd_hooks=[("hook_tokens", lambda v, hook: other)])
    assert torch.equal(swapped, model(other))


@pytest.mark.parametrize("family", ["falcon", "mamba2"])
def test_edits_in_the_other_variants(family):
    """Falcon's norms come before the hooks on dt_low, B and C; one group and two heads in Mamba-2."""
    model = model_of(family)
    tokens = tokens_for(model, rows=1, length=LENGTH, seed=7)
    for site in ("hook_dt_low", "hook_dt_pre", "hook_B", "hook_C", "hook_A_bar", "hook_h.2"):
        name = f"blocks.1.mixer.{site}"
        if site != "hook_dt_low" or family == "falcon":
            check_edits(model, tokens, {name: draw_edit(name, "scale")})


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_edits_in_a_later_chunk(family):
    """From a memory that is not empty, at every site: logits and the memory that is left."""
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH + 5, seed=12)
    _, state = model(tokens[:, :5], return_state=True)
    memory = {"conv": [layer.conv.numpy() for layer in state], "ssm": [layer.ssm.numpy() for layer in state]}
    weights, later = arrays(model.state_dict()), tokens[:, 5:]
    for name in [*FLOAT_SITES[family], "blocks.0.mixer.hook_h.0", f"blocks.1.mixer.hook_h.{LENGTH - 1}"]:
        edit, hook = draw_edit(name, kind_for(name))
        expected = reference.forward(model.cfg, weights, later.numpy(), {name: edit}, **memory)
        logits, end = model.run_with_hooks(later, fwd_hooks=[(name, hook)], initial_state=state, return_state=True)
        assert relative(logits, expected.logits) < EXACT, name
        for layer, conv, ssm in zip(end, expected.conv, expected.ssm, strict=True):
            assert relative(layer.conv, conv) < EXACT, name
            assert relative(layer.ssm, ssm) < EXACT, name


# Editing states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "name"), STATE_CASES)
def test_a_state_edit_travels_on(family, name):
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH, seed=8)
    check_edits(model, tokens, {name: draw_edit(name, kind_for(name))})


@pytest.mark.parametrize("positions", [(0, 1), (2, 3, 4), (1, 5), (-1, 0), (-2, -3), tuple(range(LENGTH))])
@pytest.mark.parametrize("family", FLOAT_SITES)
def test_several_state_edits(family, positions):
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH, seed=9)
    names = [f"blocks.{layer}.mixer.hook_h.{t}" for t in positions for layer in (0, 1)]
    check_edits(model, tokens, {name: draw_edit(name, "one element") for name in names})


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_state_edits_with_a_hook_on_the_stacked_states(family):
    """hook_h sees the states as hook_h.{t} left them; its own edit stays where it is."""
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH, seed=10)
    names = ["blocks.0.mixer.hook_h.2", "blocks.0.mixer.hook_h"]
    check_edits(model, tokens, {name: draw_edit(name, "scale") for name in names})


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_an_edit_of_the_stacked_states_is_local(family):
    model = model_of(family)
    tokens = tokens_for(model, rows=1, length=LENGTH)

    def double(h: Tensor, hook) -> Tensor:
        return torch.cat([h[:, :2], 2 * h[:, 2:3], h[:, 3:]], 1)

    def run(name: str):
        names = ["blocks.0.mixer.hook_y_scan", "blocks.0.mixer.hook_y_scan"]
        _, cache = model.run_with_cache(tokens, names_filter=names, fwd_hooks=[(name, double)] if name else [])
        return cache["y_scan", 0]

    plain, edited = run(""), run("blocks.0.mixer.hook_h")
    assert relative(edited[:, 2], 2 * plain[:, 2].numpy()) < EXACT
    others = [t for t in range(LENGTH) if t != 2]
    assert relative(edited[:, others], plain[:, others]) < EXACT
    _, after = model(tokens, return_state=True)
    with model.hooks(fwd_hooks=[("blocks.0.mixer.hook_h", double)]):
        _, after_edit = model(tokens, return_state=True)
    assert relative(after_edit[0].ssm, after[0].ssm) < EXACT, "the carried state is not what is read out"


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_one_state_under_two_names(family):
    """hook_h.3 and hook_h.-3 of 6 positions are one state: both names hold what all hooks made of it."""
    model = model_of(family)
    tokens = tokens_for(model, rows=1, length=LENGTH)
    a, b = (f"blocks.0.mixer.hook_h.{t}" for t in (3, -3))
    for reader, editor in ((a, b), (b, a)):
        hooks = [(editor, lambda h, hook: h + 1)]
        for filters in ([reader, editor], [editor, reader], [reader]):
            _, cache = model.run_with_cache(tokens, names_filter=filters, fwd_hooks=hooks)
            _, plain = model.run_with_cache(tokens, names_filter=reader)
            assert relative(cache[reader], plain[reader] + 1) < EXACT


def check_bits(family: str, dtype: torch.dtype, backend: str, lengths: dict, monkeypatch) -> None:
    op = "selective_scan" if family == "mamba" else "ssd"
    if backend not in ops.BACKENDS[op]:
        pytest.skip(f"{op} has no backend {backend!r}")
    try:
        ops.choose(op, torch.zeros(1, dtype=dtype), 3, frozenset({"h0"}), backend)
    except RuntimeError as refusal:
        pytest.skip(str(refusal))
    monkeypatch.setenv("HOOKED_MAMBA_SCAN", backend)
    model = build(family, seed=2, n_layers=1).to(dtype)
    names = ["blocks.0.mixer.hook_y_scan", "hook_logits"]
    with torch.no_grad():
        for length, positions in lengths.items():
            tokens = tokens_for(model, rows=1, length=length, seed=length)
            _, plain = model.run_with_cache(tokens, names_filter=names)
            for t in positions:
                site = f"blocks.0.mixer.hook_h.{t}"
                _, cache = model.run_with_cache(tokens, names_filter=names, fwd_hooks=[(site, lambda h, hook: h * 2)])
                for name in names:
                    assert torch.equal(cache[name][:, :t], plain[name][:, :t]), f"{name}: {t} of {length}"
                    hidden = dtype == torch.bfloat16 and name == "hook_logits"  # by rounding, now and then
                    assert hidden or not torch.equal(cache[name][:, t], plain[name][:, t]), f"{name}: {t} of {length}"


BACKENDS = ["torch", "naive", "numba"]
FEW = {7: (1, 3), 8: (0, 6), 9: (1, 7), 64: (5, 61, 62), 65: (9, 63, 64)}
MANY = {n: range(n) for n in (1, 2, 3, 7, 8, 9, 15, 16, 17)} | {
    n: (0, 1, 2, 7, 8, 9, 31, 61, 62, n // 2, n - 2, n - 1) for n in (63, 64, 65, 127, 128, 129, 200)
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", [*MAMBA, "mamba2-groups"])
def test_positions_before_a_state_edit_keep_every_bit(family, backend, monkeypatch):
    check_bits(family, torch.float32, backend, FEW, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("family", FAMILIES)
def test_positions_before_a_state_edit_keep_every_bit_at_many_lengths(family, dtype, backend, monkeypatch):
    check_bits(family, dtype, backend, MANY, monkeypatch)


# Gradients ---------------------------------------------------------------------------------------------------


def loss_along(model, tokens: Tensor, name: str, direction: np.ndarray) -> float:
    """d loss / d site along a direction, by the complex step."""
    moved = equations(model, tokens, {name: lambda value: value + 1j * reference.STEP * direction})
    return float(reference.derivative(reference.cross_entropy(moved.logits, tokens.numpy())))


def close(terms: np.ndarray, expected: float, what: str) -> None:
    assert abs(terms.sum() - expected) <= EXACT * np.abs(terms).sum() + 1e-18, what


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_the_gradient_read_at_every_site_is_the_derivative(family):
    """At hook_h that of the local read-out, at hook_h.{t} the full adjoint: each is what an edit there would do."""
    model = model_of(family)
    tokens = tokens_for(model, rows=2, length=LENGTH, seed=1)
    names = FLOAT_SITES[family] + [name for other, name in STATE_CASES if other == family]
    rng, grads = np.random.default_rng(0), {}
    for group in (names, [n for n in names if not n.endswith(("A_bar", "B_bar", "Bx", "hook_h"))]):
        # All sites at once (materialised), then without those that need it (fused, cut at single states).
        def keep(grad: Tensor, hook) -> None:
            grads[hook.name] = grad.numpy().copy()

        loss = model.run_with_hooks(tokens, return_type="loss", bwd_hooks=[(name, keep) for name in group])
        loss.backward()
        for name in group:
            direction = rng.standard_normal(grads[name].shape)
            terms = grads[name] * direction
            close(terms, loss_along(model, tokens, name, direction), name)
            dead = re.fullmatch(r"blocks\.\d\.mixer\.hook_h\.(5|-1)", name) or name == "hook_logits"
            assert np.abs(terms).sum() > 0 or dead, f"{name} gets no gradient"
        grads.clear()


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_run_with_cache_keeps_gradients(family):
    model = model_of(family)
    tokens = tokens_for(model, rows=1, length=LENGTH, seed=2)
    names = [*FLOAT_SITES[family], "blocks.0.mixer.hook_h.1"]
    _, cache = model.run_with_cache(tokens, names_filter=names, incl_bwd=True, return_type="loss")
    rng = np.random.default_rng(1)
    for name in names:
        grad = cache[f"{name}_grad"].numpy()
        direction = rng.standard_normal(grad.shape)
        close(grad * direction, loss_along(model, tokens, name, direction), name)


@pytest.mark.parametrize(("family", "name"), CASES + STATE_CASES)
def test_an_edited_gradient_is_what_flows_on(family, name):
    """dL/d embed after a backward hook replaces g by g': dL/d embed + (d site / d embed)^T (g' - g)."""
    model = model_of(family)
    tokens = tokens_for(model, rows=1, length=LENGTH, seed=4)
    rng, seen = np.random.default_rng(zlib.crc32(name.encode())), {}

    def replace(grad: Tensor, hook) -> Tensor:
        seen["old"] = grad.numpy().copy()
        seen["new"] = rng.standard_normal(grad.shape) * (np.abs(seen["old"]).max() + 0.1)
        return torch.from_numpy(seen["new"])

    def at_embed(grad: Tensor, hook) -> None:
        seen["embed"] = grad.numpy().copy()

    hooks = [(name, replace)] + ([("hook_embed", at_embed)] if name != "hook_embed" else [])
    model.run_with_hooks(tokens, return_type="loss", bwd_hooks=hooks).backward()
    direction = rng.standard_normal((1, LENGTH, model.cfg.d_model))
    moved = equations(model, tokens, {"hook_embed": lambda v: v + 1j * reference.STEP * direction})
    site = moved.sites[re.sub(r"\.-(\d+)$", lambda m: f".{LENGTH - int(m[1])}", name)]
    change = reference.derivative(site) * (seen["new"] - seen["old"])
    expected = reference.derivative(reference.cross_entropy(moved.logits, tokens.numpy())) + change.sum()
    if name == "hook_embed":  # nothing comes before it but the weights
        return
    terms = seen["embed"] * direction
    assert math.isclose(
        terms.sum(), expected, rel_tol=EXACT, abs_tol=EXACT * (np.abs(terms).sum() + np.abs(change).sum())
    )


@pytest.mark.parametrize("family", FLOAT_SITES)
def test_an_edited_gradient_at_the_embedding_reaches_its_weight(family):
    model = build(family, seed=1).double()
    tokens = tokens_for(model, rows=1, length=LENGTH)
    new = torch.randn(1, LENGTH, model.cfg.d_model, dtype=torch.float64)
    logits = model.run_with_hooks(tokens, bwd_hooks=[("hook_embed", lambda g, hook: new)])
    logits.sum().backward()
    expected = torch.zeros_like(model.W_E).index_add_(0, tokens[0], new[0])
    if model.cfg.tie_embeddings:
        with torch.no_grad():
            _, cache = model.run_with_cache(tokens, names_filter="ln_final.hook_out")
        expected += cache["ln_final.hook_out"].sum((0, 1))
    assert relative(model.embed.weight.grad, expected) < EXACT


def test_globs_find_what_they_say():
    model = model_of("mamba")
    names = list(model.hook_dict)
    assert match_names("blocks.*.mixer.hook_dt", names) == ["blocks.0.mixer.hook_dt", "blocks.1.mixer.hook_dt"]
    assert match_names("blocks.*.mixer.hook_h.-2", names) == [f"blocks.{i}.mixer.hook_h.-2" for i in (0, 1)]
