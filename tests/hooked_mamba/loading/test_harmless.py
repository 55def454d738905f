"""Tensors that their own library treats as harmless load; quantised weights and odd limits say what they are."""

import math

import pytest
import torch

from hooked_mamba import HookedMamba, Mamba2Config
from hooked_mamba.loading.hf_fields import limit_of
from hooked_mamba.loading.quantised.read import dequantised
from hooked_mamba.loading.registry import FORMATS
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.tying import drop_tied
from hooked_mamba.loading.weights import load_into
from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.tiny import build


def test_an_embedding_that_is_stored_as_the_unembedding():
    weight = torch.randn(4, 3)
    state = drop_tied(LazyState.of({"unembed.weight": weight}), True)
    assert list(state) == ["embed.weight"]
    assert torch.equal(state["embed.weight"], weight)
    assert list(drop_tied(LazyState.of({"unembed.weight": weight}), False)) == ["unembed.weight"]


def test_limits_in_every_form():
    for given in (None, [0.0, math.inf], [0.0, "Infinity"], [0.0, None], [None, None]):
        assert limit_of(given) == (0.0, math.inf)
    assert limit_of([0.1, 2]) == (0.1, 2.0)
    assert build("mamba2", dt_limit=(0.0, 1e308)).cfg.dt_limit == (0.0, math.inf)
    assert Mamba2Config(d_model=6, n_layers=1, d_vocab=5, head_dim=3, dt_limit=(0.0, 1e30)).dt_limit == (0.0, 1e30)
    for given in ([0.0], 3.0, ["low", 1.0]):
        with pytest.raises(CheckpointError, match="time_step_limit must be two numbers"):
            limit_of(given)


def test_quantised_weights_say_so():
    config = {"quantization_config": {"quant_method": "hqq"}}
    plain = {"a": torch.zeros(2)}
    dequantised({}, LazyState.of({"a": torch.zeros(2, dtype=torch.int8)}))  # loading says what is wrong with it
    dequantised(config, LazyState.of(plain))  # taken back already
    for dtype in (torch.uint8, torch.int32, torch.float8_e4m3fn):
        with pytest.raises(
            CheckpointError, match=r"quantised by hqq \(b is .*not read here; read are bits.*dequantize"
        ):
            dequantised(config, LazyState.of(plain | {"b": torch.zeros(2, dtype=dtype)}))
    model = build("mamba")
    state = model.state_dict_for_files()
    state["blocks.0.mixer.in_proj.weight"] = torch.zeros(100, 1, dtype=torch.uint8)
    with pytest.raises(CheckpointError, match=r"got torch.uint8 \(quantised"):
        load_into(HookedMamba(model.cfg), state)


def test_a_hybrids_embedding_that_is_stored_as_the_unembedding():
    one = hybrids.tiny("lfm2")
    cfg, state = one.model.cfg, {name: torch.as_tensor(value) for name, value in one.weights.items()}
    assert cfg.tie_embeddings
    name = next(name for name in state if "embed_tokens" in name)
    state["lm_head.weight"] = state.pop(name)
    config = {**one.config, "model_type": "lfm2"}
    _, found = FORMATS["hf_lfm2"].to_ours(config, LazyState.of(state))
    assert torch.equal(found["embed.weight"], state["lm_head.weight"])
    assert "unembed.weight" not in found
