"""Zamba's shared transformer: one set of weights, hook points for each use."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import HookedHybrid, load_model
from tests.hooked_mamba.hybrids.tiny import tiny, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
USES = {"zamba": [(1, 3)], "zamba2": [(1, 4)]}
SHARED = ("norm_shared.weight", "attn.q_proj.weight", "attn.o_proj.weight", "norm2.weight", "mlp.gate_proj.weight")


@pytest.mark.parametrize("how", ["object", "file", "random", "double", "copied"])
@pytest.mark.parametrize("case", USES)
def test_uses_have_their_weights_in_common(case, how, tmp_path):
    import copy

    model = HookedHybrid.from_hf(tiny(case).hf)
    if how == "file":
        model.save_pretrained(tmp_path)
        model = load_model(tmp_path)
    if how == "random":
        model = HookedHybrid(model.cfg, seed=0)
    if how == "double":
        model = model.double()
    if how == "copied":
        model = copy.deepcopy(model)
    for a, b in USES[case]:
        for name in SHARED:
            assert model.blocks[a].get_parameter(name) is model.blocks[b].get_parameter(name), name
        assert model.blocks[a].linear.weight is not model.blocks[b].linear.weight
    if case == "zamba2":
        own = [model.blocks[i].attn.adapters["q"].a.weight for i in (1, 4)]
        assert own[0] is not own[1]
        assert model.blocks[1].attn.q_proj.weight is not model.blocks[3].attn.q_proj.weight


@pytest.mark.parametrize("case", USES)
def test_files_hold_them_once(case):
    model = HookedHybrid.from_hf(tiny(case).hf)
    weights = model.state_dict_for_files()
    addresses = [value.data_ptr() for value in weights.values()]
    assert len(set(addresses)) == len(addresses)
    assert sum(v.numel() for v in weights.values()) == sum(p.numel() for p in tiny(case).hf.parameters())


@torch.no_grad()
@pytest.mark.parametrize("case", USES)
def test_a_hook_reaches_one_use(case):
    model, tokens = tiny(case).model, tokens_for(length=5)
    a, b = USES[case][0]
    seen = []
    hooks = [(f"blocks.{a}.attn.hook_q", lambda v, hook: seen.append(hook.name))]
    with model.hooks(fwd_hooks=hooks):
        model(tokens)
    assert seen == [f"blocks.{a}.attn.hook_q"]
    _, cache = model.run_with_cache(tokens)
    assert relative(cache[f"blocks.{a}.attn.hook_q"], cache[f"blocks.{b}.attn.hook_q"]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("case", USES)
def test_a_later_start_needs_the_tokens(case):
    model, tokens = tiny(case).model, tokens_for(length=5)
    resid = model(tokens, stop_at_layer=1)
    with pytest.raises(ValueError, match="tokens="):
        model(resid, start_at_layer=1)
    embedded = model.embed_tokens(tokens)
    for given in ({"tokens": tokens}, {"carry": {"embed": embedded}}):
        assert relative(model(resid, start_at_layer=1, **given), model(tokens)) < 1e-12
    late = model(tokens, stop_at_layer=model.cfg.n_layers - 1)
    assert relative(model(late, start_at_layer=model.cfg.n_layers - 1), model(tokens)) < 1e-12
