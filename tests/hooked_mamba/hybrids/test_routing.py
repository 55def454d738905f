"""Mixtures of experts: editable routing, ties, dense sites."""

from __future__ import annotations

import pytest
import torch

from tests.hooked_mamba.hybrids.tiny import tiny, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
MOE = {"jamba": "blocks.1.moe.", "granite-moe": "blocks.0.moe.", "nemotron": "blocks.1.moe."}


@torch.no_grad()
@pytest.mark.parametrize("case", MOE)
def test_weights_and_experts_follow_edited_indices(case):
    model, tokens, at = tiny(case).model, tokens_for(length=6), MOE[case]
    names = [n for n in model.hook_dict if n.startswith(at)]
    _, before = model.run_with_cache(tokens, names_filter=names)
    chosen = before[f"{at}hook_expert_indices"]
    swapped = chosen.flip(-1)
    with model.hooks(fwd_hooks=[(f"{at}hook_expert_indices", lambda v, hook: swapped)]):
        logits, after = model.run_with_cache(tokens, names_filter=names)
    for site in ("hook_expert_weights", "hook_expert_out", "hook_expert_post"):
        assert relative(after[at + site], before[at + site].flip(2)) < 1e-12, site
    assert relative(logits, model(tokens)) < 1e-12  # the order of a sum
    other = (chosen + 1) % model.cfg.branches["moe"].n_experts
    with model.hooks(fwd_hooks=[(f"{at}hook_expert_indices", lambda v, hook: other)]):
        _, after = model.run_with_cache(tokens, names_filter=names)
    moe = model.blocks[int(at.split(".")[1])].moe
    logits, scores = before[f"{at}hook_router_logits"], before[f"{at}hook_router_scores"]
    assert relative(after[f"{at}hook_expert_weights"], moe.weigh(logits, scores, other)) < 1e-12


@torch.no_grad()
@pytest.mark.parametrize("case", MOE)
def test_ties_go_to_the_lower_index(case):
    model, at = tiny(case).model, MOE[case]
    edits = [(f"{at}hook_router_scores", lambda v, hook: torch.zeros_like(v))]
    with model.hooks(fwd_hooks=edits):
        _, cache = model.run_with_cache(tokens_for(length=3), names_filter=f"{at}hook_expert_indices")
    k = model.cfg.branches["moe"].top_k
    assert (cache[f"{at}hook_expert_indices"] == torch.arange(k)).all()


@torch.no_grad()
@pytest.mark.parametrize("case", MOE)
def test_sites_of_experts_are_dense_also_with_padding(case):
    model, tokens, at = tiny(case).model, tokens_for(length=6), MOE[case]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0]])
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.startswith(at), attention_mask=mask)
    moe = model.cfg.branches["moe"]
    for name, value in cache.items():
        assert value.shape[:2] == (2, 6)
        assert value.isfinite().all(), name
    assert cache[f"{at}hook_expert_pre"].shape == (2, 6, moe.top_k, moe.d_mlp)
    assert cache[f"{at}hook_expert_out"].shape == (2, 6, moe.top_k, moe.d_expert)


@torch.no_grad()
def test_the_bias_chooses_and_does_not_weigh():
    model, at = tiny("nemotron").model, MOE["nemotron"]
    moe = model.blocks[1].moe
    kept = moe.correction_bias.clone()
    try:
        moe.correction_bias.zero_()
        moe.correction_bias[5:7] = 10
        _, cache = model.run_with_cache(tokens_for(length=4), names_filter=lambda n: n.startswith(at))
    finally:
        moe.correction_bias.copy_(kept)
    assert set(cache[f"{at}hook_expert_indices"].flatten().tolist()) == {5, 6}
    plain = cache[f"{at}hook_router_logits"].sigmoid().gather(-1, cache[f"{at}hook_expert_indices"])
    expected = 2.5 * plain / plain.sum(-1, keepdim=True)
    assert relative(cache[f"{at}hook_expert_weights"], expected) < 1e-12


@torch.no_grad()
def test_only_the_best_groups_take_part():
    model, at = tiny("nemotron").model, MOE["nemotron"]
    names = [f"{at}hook_expert_indices", f"{at}hook_router_scores"]
    _, cache = model.run_with_cache(tokens_for(), names_filter=names)
    indices, scores = cache[names[0]], cache[names[1]]
    group = indices // 4
    assert (group[..., 0] == group[..., 1]).all()
    free = scores.topk(2, -1).indices // 4
    assert (free[..., 0] != free[..., 1]).any()  # without groups some token would mix them
