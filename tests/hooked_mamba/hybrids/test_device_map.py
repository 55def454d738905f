"""One model on several devices: plans, and passes over a second device that holds numbers and calls itself "meta"."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import HookedHybrid, load_model
from hooked_mamba.config import Mamba2Config
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig, MLPConfig, MoEConfig
from hooked_mamba.model.device_map import part_sizes, plan
from tests.circuits.elsewhere import Elsewhere, another_device, moved
from tests.hooked_mamba.hybrids.tiny import tiny, tokens_for

pytestmark = pytest.mark.usefixtures("fast")


def large() -> HookedHybrid:
    """The shape of a hybrid of 30 billion parameters, without its weights."""
    size = {"d_model": 2688, "n_layers": 52}
    branches = {
        "mixer": Mamba2Config(**size, d_vocab=131072, d_inner=4096, head_dim=64, n_groups=8, d_state=128),
        "attn": AttentionConfig(**size, n_heads=32, n_key_value_heads=2, d_head=128),
        "moe": MoEConfig(**size, n_experts=128, top_k=6, d_mlp=1856, gated=False, scoring="sigmoid"),
        "mlp": MLPConfig(**size, d_mlp=3712, gated=False),
    }
    kinds = [(("mixer",),), (("moe", "mlp"),)] * 23 + [(("attn",),)] * 6
    return HookedHybrid.empty(
        HybridConfig(**size, d_vocab=131072, tie_embeddings=False, branches=branches, layout=tuple(kinds))
    )


def test_a_large_model_is_planned_without_its_weights():
    model = large()
    total = sum(p.numel() for p in model.parameters())
    assert 28e9 < total < 34e9
    sizes = part_sizes(model, torch.bfloat16)
    assert 2 * total <= sum(sizes.values()) < 2.01 * total
    found = plan(model, "auto", torch.bfloat16, {"cuda:0": 40 * 2**30, "cuda:1": 40 * 2**30})
    assert found.on("cuda:0") <= 40 * 2**30
    assert found.on("cuda:0") + found.on("cuda:1") == sum(sizes.values())
    order = list(found.places.values())
    assert order == sorted(order)
    assert len(found.lines()) == 2
    with pytest.raises(MemoryError, match=r"everything before blocks\.") as caught:
        plan(model, "auto", torch.bfloat16, {"cuda:0": 24 * 2**30})
    assert "cuda:0 with 24.0 GiB" in str(caught.value)


def test_what_a_plan_refuses():
    model = HookedHybrid.from_hf(tiny("nemotron").hf)
    with pytest.raises(ValueError, match=r"blocks\.9"):
        plan(model, {"blocks.9": "cpu", "": "cpu"})
    with pytest.raises(ValueError, match="has no entry for ln_final"):
        plan(model, {"embed": "cpu", "blocks": "cpu"})
    with pytest.raises(ValueError, match="'auto'"):
        plan(model, "balanced")
    shared = HookedHybrid.from_hf(tiny("zamba").hf)
    with pytest.raises(ValueError, match="share weights"):
        plan(shared, {"blocks.3": "meta", "": "cpu"})
    with pytest.raises(ValueError, match="share weights"):
        plan(shared, {"unembed": "meta", "": "cpu"})


def test_auto_keeps_what_is_shared_together():
    shared = HookedHybrid.from_hf(tiny("zamba").hf)
    sizes = part_sizes(shared)
    room = sizes["embed"] + sizes["blocks.0"] + sizes["blocks.1"] + sizes["blocks.3"] + 10
    found = plan(shared, "auto", devices={"a": room, "b": 10**9})
    assert found.places["blocks.3"] == found.places["blocks.1"] == found.places["unembed"] == "a"
    assert found.places["blocks.4"] == "b"


def test_loading_by_a_map(tmp_path):
    model = HookedHybrid.from_hf(tiny("bamba").hf)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, device_map={"": "cpu"})
    assert torch.equal(loaded(tokens_for()), model(tokens_for()))
    assert torch.equal(load_model(tmp_path, device_map="auto").to("cpu")(tokens_for()), model(tokens_for()))
    with pytest.raises(ValueError, match="not both"):
        load_model(tmp_path, device="cpu", device_map="auto")


@torch.no_grad()
@pytest.mark.parametrize("case", ["bamba", "granite-dense", "falcon", "nemotron", "lfm2"])
def test_stream_state_and_hooks_follow_the_blocks(case):
    model, tokens = HookedHybrid.from_hf(tiny(case).hf), tokens_for(length=6)
    mask = torch.tensor([[0, 1, 1, 1, 1, 1], [1] * 6])
    n = model.cfg.n_layers

    def everything():
        _, state = model(tokens[:, :4], attention_mask=mask[:, :4], return_state=True)
        logits, cache = model.run_with_cache(tokens[:, 4:], initial_state=state, device="cpu")
        loss = model(tokens, return_type="loss")
        where = [t.device.type for t in state[n - 2]]
        return [logits.cpu(), loss.cpu(), *cache.cache_dict.values()], where

    expected, _ = everything()
    with another_device():
        for i in (0, n - 2):
            moved(model.blocks[i])
        found, where = everything()
        assert set(where) <= {"meta"}
        seen = []
        hooks = [(f"blocks.{n - 2}.hook_resid_pre", lambda v, hook: seen.append(type(v)))]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert seen == [Elsewhere]
        made = model.generate(tokens, 3, do_sample=False, stop_at_eos=False, verbose=False)
    for a, b in zip(found, expected, strict=True):
        assert type(a) is torch.Tensor
        torch.testing.assert_close(a, b)
    assert torch.equal(
        made, HookedHybrid.from_hf(tiny(case).hf).generate(tokens, 3, do_sample=False, stop_at_eos=False, verbose=False)
    )
