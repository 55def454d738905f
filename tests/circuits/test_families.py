"""Every family of hybrids: a target is the sum of its parts, which are what a model loses whose gates are held."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuits import Direction, Feature, FrozenModel, Logit, attribute, build_graph, patch_effects
from hooked_mamba import HookedHybrid
from saes import SparseCoder, mambacoder_config
from tests.hooked_mamba.hybrids.tiny import SOME, tiny, tokens_for
from tests.saes.models import noisy


@pytest.mark.parametrize("start", [pytest.param("empty", marks=pytest.mark.slow), "padded", "going on"])
@pytest.mark.parametrize("case", SOME)
def test_parts_sum_to_targets(case, start):
    model, tokens, run = tiny(case).model, tokens_for(length=6), {}
    if start == "padded":
        run = {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    elif start == "going on":
        run = {"initial_state": model(tokens_for(length=3, seed=1), return_state=True)[1]}
    vector = torch.ones(model.cfg.d_model, dtype=torch.float64)
    targets = [Logit(3), Logit(2, 3, minus=4), Direction(vector, 2, -1)]
    found = attribute(FrozenModel(model, tokens, **run), targets=targets)
    assert found.residual.abs().max() < 1e-10
    assert found.target.abs().min() > 1e-4


def held_hooks(model: HookedHybrid, cache: Any) -> list[tuple[str, Callable]]:
    """Hooks by which the model itself becomes affine: what selects, gates or divides keeps the numbers of a run."""
    always = ("hook_scale", "hook_pattern", "hook_expert_indices", "hook_expert_weights", "hook_dt", "hook_C")
    now: dict[str, Tensor] = {}

    def kept(name: str) -> Callable:
        return lambda value, hook: cache[name].clone()

    def stored(value: Tensor, hook: Any) -> None:
        now[hook.name] = value.clone()

    def factor(before: str, name: str) -> Callable:
        """The activation as a product of what it reads now and a number of the run."""

        def edit(value: Tensor, hook: Any) -> Tensor:
            width = value[0, 0].numel()
            x, y = cache[before][..., :width].reshape(value.shape), cache[name]
            share = torch.where(x == 0, 0, y / torch.where(x == 0, 1, x))
            return now[before][..., :width].reshape(value.shape) * share

        return edit

    hooks: list[tuple[str, Callable]] = []
    for name in model.hook_dict:
        at, _, hook = name.rpartition(".")
        if hook in always or hook in ("hook_B", "hook_gate"):
            hooks.append((name, kept(name)))
        short_conv = f"{at}.hook_y_gated" in model.hook_dict and f"{at}.hook_dt" not in model.hook_dict
        if hook == "hook_conv" and not short_conv:
            hooks += [(name, stored), (f"{at}.hook_x", factor(name, f"{at}.hook_x"))]
        if hook in ("hook_pre", "hook_expert_pre"):
            post = f"{at}.{hook.replace('pre', 'post')}"
            gated = f"{name}_linear" in model.hook_dict
            hooks += [(name, kept(name))] if gated else [(name, stored), (post, factor(name, post))]
    return hooks


@torch.no_grad()
@pytest.mark.parametrize("case", SOME)
def test_embeddings_are_what_a_held_model_loses(case):
    """Differences of the real model, which is affine once its selections, gates and norms are held, are exact."""
    model, tokens = tiny(case).model, tokens_for(1, 5)
    logits, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    whole = attribute(FrozenModel(model, tokens), targets=Logit(7)).embeddings[0]
    for t in (0, 2, 4):

        def without(value: Tensor, hook: Any, t: int = t) -> Tensor:
            value[:, t] = 0
            return value

        changed = model.run_with_hooks(tokens, fwd_hooks=[*held_hooks(model, cache), ("hook_embed", without)])
        lost = float(logits[0, -1, 7] - changed[0, -1, 7])
        assert abs(float(whole[t]) - lost) < 1e-10 * max(1, abs(lost))


@pytest.mark.parametrize("case", ["granite-moe", "nemotron", "jamba"])
def test_experts_add_up(case):
    model, tokens = tiny(case).model, tokens_for(1, 5)
    frozen = FrozenModel(model, tokens)
    found = attribute(frozen, targets=Logit(7))
    parts = [part for part in found.heads if str(part).endswith(".moe")]
    assert parts
    for part in parts:
        chosen = frozen.cache[f"blocks.{part.replace('.moe', '')}.moe.hook_expert_indices"][0]
        effects = found.experts[part][0]
        outside = torch.ones_like(effects).scatter(-1, chosen, 0).bool()
        assert (effects[outside] == 0).all()
        torch.testing.assert_close(effects.sum(-1), found.heads[part][0].sum(-1), rtol=1e-12, atol=1e-14)
    # The last layer's experts write straight to the logits: what each adds is its output times the direction.
    layer = max(int(part.split(".")[0]) for part in parts)
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: True)
    stack = cache.stack_expert_results(return_labels=True)
    direct = {
        label: float(value)
        for label, value in zip(stack[1], cache.logit_attrs(stack[0], 7)[:, 0, -1], strict=True)
        if label.startswith(f"L{layer}E")
    }
    if layer == model.cfg.n_layers - 1:
        last = found.experts[f"{layer}.moe"][0, -1]
        for e, value in enumerate(last.tolist()):
            assert abs(value - direct[f"L{layer}E{e}"]) < 1e-10


@pytest.mark.parametrize("case", ["lfm2", "zamba2", "granite-moe"])
def test_graphs_and_patching_pass_through_every_kind(case):
    frozen = FrozenModel(tiny(case).model, tokens_for(1, 5))
    graph = build_graph(frozen, [Logit(3)], max_heads=6)
    assert float(graph.residual().abs().max()) < 1e-10
    assert patch_effects(frozen, target=3, replace_by=5).residual.abs().max() < 1e-10


@pytest.mark.parametrize("case", ["lfm2", "zamba", "granite-moe", "nemotron", "falcon"])
def test_by_gradients_nothing_is_held(case):
    """The rule "gradient" goes down every kind of branch as autograd does."""
    model, tokens = tiny(case).model, tokens_for(1, 5)
    found = attribute(FrozenModel(model, tokens, selection="gradient"), targets=Logit(7)).embeddings[0]
    kept: dict[str, Tensor] = {}
    hooks = [("hook_embed", lambda grad, hook: kept.__setitem__("grad", grad.clone()))]
    with model.hooks(bwd_hooks=hooks):
        logits, cache = model.run_with_cache(tokens, names_filter="hook_embed")
        logits[0, -1, 7].backward()
    expected = (kept["grad"] * cache["hook_embed"]).sum(-1)[0]
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("case", ["zamba", "zamba2"])
def test_a_coder_of_a_mixer_behind_a_shared_transformer(case):
    """It reads the mixer's norm, which sees the transformer's output: paths go on through it, and sum."""
    model = tiny(case).model
    layer = next(i for i in range(1, model.cfg.n_layers) if model.block(i).beside)
    cfg = mambacoder_config(layer, model.cfg.d_model, 24, architecture="topk", k=3)
    coder = noisy(SparseCoder(cfg.replace(out_site=f"blocks.{layer}.hook_mixer_out"), seed=0))
    frozen = FrozenModel(model, tokens_for(1, 5), [coder])
    active = int(frozen.coded[layer].codes.indices[0, -1, 0])
    found = attribute(frozen, targets=[Logit(3), Feature(coder, active)])
    assert found.residual.abs().max() < 1e-10
    assert found.embeddings[1].abs().max() > 1e-4
    graph = build_graph(frozen, Logit(3), max_heads=8)
    assert graph.residual().abs().max() < 1e-10
    assert int(graph.where("feature").sum()) > 0
