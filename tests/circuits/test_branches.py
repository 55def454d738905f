"""Blocks of several branches: every target is the sum of its parts, whatever stands in the blocks."""

from __future__ import annotations

import pytest
import torch

from circuits import Channel, Direction, FrozenModel, Logit, attribute, build_graph, patch_effects
from hooked_mamba.config import Mamba2Config, MambaConfig
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig, MLPConfig
from hooked_mamba.model.hybrid import HookedHybrid

SHAPE = {"d_model": 8, "n_layers": 3, "d_vocab": 17}
LAYOUTS = {
    "one after the other": ((("mixer",), ("mlp",)), (("attn",), ("mlp",)), (("mixer",),)),
    "side by side": ((("mixer", "attn"), ("mlp",)),) * 3,
    "no mixer at first": ((("attn",),), (("mlp",),), (("mixer",),)),
}


def hybrid(layout, gated=True, mamba2=True, scales=None):
    both = {"d_model": 8, "n_layers": 3}
    mixer = Mamba2Config(**SHAPE, d_state=3, head_dim=4) if mamba2 else MambaConfig(**SHAPE, d_state=3)
    branches = {
        "mixer": mixer,
        "attn": AttentionConfig(**both, n_heads=4, n_key_value_heads=2, d_head=3, qkv_bias=True, out_bias=True),
        "mlp": MLPConfig(**both, d_mlp=10, gated=gated, activation="silu" if gated else "relu2", bias=True),
    }
    config = HybridConfig(**SHAPE, branches=branches, layout=layout, **(scales or {}))
    model = HookedHybrid(config, seed=1).double()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return model


def tokens_for(seed=0, batch=2, length=6):
    return torch.randint(17, (batch, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("start", ["empty", "padded", "going on"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_parts_sum_to_targets(name, start):
    scales = {"in_scales": {"attn": 1.3, "mixer": 0.6}, "out_scales": {"mlp": 0.4}, "logit_multiplier": 0.5}
    model = hybrid(LAYOUTS[name], gated=name != "side by side", mamba2=name != "no mixer at first", scales=scales)
    tokens, run = tokens_for(), {}
    if start == "padded":
        run = {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    elif start == "going on":
        run = {"initial_state": model(tokens_for(1), return_state=True)[1].detach()}
    targets = [Logit(3), Logit(2, 3, minus=4), Channel(2, 1, 3), Direction(torch.ones(8, dtype=torch.float64), 2, -1)]
    frozen = FrozenModel(model, tokens, **run)
    found = attribute(frozen, targets=targets)
    assert found.residual.abs().max() < 1e-10
    assert found.target.abs().min() > 1e-4
    if start == "going on":
        assert any(float(part.abs().max()) > 1e-6 for key, part in found.initial.items() if "attn" in str(key))


@torch.no_grad()
@pytest.mark.parametrize("name", LAYOUTS)
def test_embeddings_are_what_the_frozen_model_loses(name):
    """The chains run forwards, an embedding left out, against covectors pulled back."""
    frozen = FrozenModel(hybrid(LAYOUTS[name]), tokens_for(batch=1))
    row = torch.zeros(1, dtype=torch.long)
    whole = attribute(frozen, targets=Logit(3)).embeddings[0]
    for t in (0, 4):
        change = torch.zeros_like(frozen.resid(0))
        change[0, t] = frozen.resid(0)[0, t]
        for layer in range(3):
            for stage in frozen.stages(layer):
                change = change + sum(frozen.chain(part).push(change, row)[0] for part in stage)
        lost = frozen.final_norm.push(change)[0, -1] @ frozen.unembedding[:, 3]
        assert abs(float(whole[t] - lost)) < 1e-10


def test_graphs_and_patching_pass_through_other_branches():
    frozen = FrozenModel(hybrid(LAYOUTS["side by side"]), tokens_for(batch=1))
    graph = build_graph(frozen, [Logit(3)], max_heads=6)
    assert float(graph.residual().abs().max()) < 1e-10
    assert patch_effects(frozen, target=3, replace_by=2).residual.abs().max() < 1e-10
