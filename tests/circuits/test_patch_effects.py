"""Effects through selection and gates: sums, and each corner against the replay in numpy."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import Channel, Direction, Feature, FrozenModel, Logit, attribute, patch_effects
from saes import SparseCoder, mambacoder_config
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import Replay
from tests.kinds import MAMBA


def replay_of(model, tokens):
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
    return Replay(model, cache, 0)


def mixed(value, selection, gates):
    """A replay with embeddings, selection and gates of three others."""
    made = object.__new__(Replay)
    made.__dict__.update(gates.__dict__, embed=value.embed, layers=[])
    for c, g in zip(selection.layers, gates.layers, strict=True):
        layer = object.__new__(type(g))
        layer.__dict__.update(g.__dict__, alpha=c.alpha)
        made.layers.append(layer)
    return made


@pytest.mark.parametrize("seed", range(8))
def test_every_term_is_a_difference_of_replays(seed):
    model, tokens = random_model(seed), random_tokens(seed, length=6)
    found = patch_effects(model, tokens, Logit(3, 4), replace_by=11, positions=[1, -2], batch=1)
    assert found.positions.tolist() == [1, 4]
    a = replay_of(model, tokens)
    for k, q in enumerate((1, 4)):
        other = tokens.clone()
        other[0, q] = 11
        b = replay_of(model, other)
        corner = {
            (v, c, g): mixed(v_run, c_run, g_run).logit(3, 4)
            for v, v_run in enumerate((a, b)) for c, c_run in enumerate((a, b)) for g, g_run in enumerate((a, b))
        }  # fmt: skip
        forward = [corner[0, 0, 0], corner[1, 0, 0], corner[1, 1, 0], corner[1, 1, 1]]
        reverse = [corner[0, 0, 0], corner[0, 0, 1], corner[0, 1, 1], corner[1, 1, 1]]
        for name, i in (("value", 0), ("selection", 1), ("gates", 2)):
            assert abs(float(getattr(found.forward, name)[k]) - forward[i] + forward[i + 1]) < 1e-9
            assert abs(float(getattr(found.reverse, name)[k]) - reverse[2 - i] + reverse[3 - i]) < 1e-9
        assert abs(float(found.effect[k]) - corner[0, 0, 0] + corner[1, 1, 1]) < 1e-9
    assert found.residual.max() < 1e-10
    assert np.isclose(found.target, corner[0, 0, 0])


@pytest.mark.parametrize("family", MAMBA)
def test_layers_padding_memory_and_all_kinds_of_targets(family):
    model, tokens = random_model(5, family, n_layers=3), random_tokens(5, length=8)
    d, E = model.cfg.d_model, model.cfg.E
    coder = SparseCoder(mambacoder_config(1, d, 7, k=3), seed=0).double()
    vector = torch.linspace(-1, 1, d, dtype=torch.float64)
    mask = torch.ones(1, 8, dtype=torch.long)
    mask[0, :2] = 0
    with torch.no_grad():
        _, state = model(tokens[:, :3], return_state=True)
    runs = [
        FrozenModel(model, tokens),
        FrozenModel(model, tokens, attention_mask=mask),
        FrozenModel(model, tokens[:, 3:], initial_state=state),
    ]
    targets = [5, Logit((4,), minus=(2,)), Feature(coder, 3), Direction(vector, 2, -2), Direction(vector, 1, -1, "out"),
               Channel(1, E - 1, 3)]  # fmt: skip
    for frozen in runs:
        for target in targets:
            found = patch_effects(frozen, target=target, replace_by=[11, 7], positions=[2, 3], by_layer=True, batch=3)
            assert found.residual.max() < 1e-10
            for split in (found.forward, found.reverse):
                assert split.selection_by_layer.shape == (len(found.positions), 3)
                assert split.gates_by_layer.shape == (len(found.positions), 4)
                assert torch.allclose(split.selection_by_layer.sum(1), split.selection)
        whole = patch_effects(frozen, target=target, replace_by=[11, 7])
        at = [int(t) in (2, 3) for t in whole.positions]
        assert torch.allclose(whole.forward.selection[at], found.forward.selection, atol=1e-10)
        assert torch.allclose(whole.reverse.gates[at], found.reverse.gates, atol=1e-10)
        assert (0 in whole.positions) == (frozen.mask is None)
    by_layer = found.forward.selection_by_layer.abs().amax(0)  # the last target is read before layer 1's scan
    assert by_layer[1:].max() < 1e-12 < by_layer[0]


def test_value_is_what_frozen_attribution_says():
    model, tokens = random_model(8, "mamba", n_layers=2), random_tokens(8)
    with torch.no_grad():
        model.embed.weight[16] = 0
        model.unembed.weight[3] += 1
    found = patch_effects(model, tokens, 3, replace_by=16)
    assert torch.allclose(found.forward.value, attribute(model, (), tokens, Logit(3)).embeddings[0])
    assert found.forward.selection.abs().max() > 1e-3


def test_means_leave_out_the_token_itself():
    model, tokens = random_model(8, "mamba2", n_layers=1), torch.tensor([[1, 2, 3, 4]])
    both, one = (patch_effects(model, tokens, 3, replace_by=r) for r in ([2, 9], [9]))
    assert torch.allclose(both.effect[1], one.effect[1])
    assert not torch.allclose(both.effect[0], one.effect[0])
    same = patch_effects(model, tokens, 3, replace_by=2, positions=[1])
    assert same.effect.tolist() == same.forward.total.tolist() == [0.0]
    assert str(one).splitlines()[1].startswith("'1'@0: ")


def test_what_is_refused():
    model, tokens = random_model(1, "mamba"), random_tokens(1, length=4)
    for message, arguments in {
        "give a model and a prompt": (model, None, 3),
        "expected one prompt, got 2": (model, tokens.repeat(2, 1), 3),
        "no target": (model, tokens, None),
    }.items():
        with pytest.raises(ValueError, match=message):
            patch_effects(*arguments, replace_by=3)
    with pytest.raises(ValueError, match="no replacement"):
        patch_effects(model, tokens, 3, replace_by=[])
    with pytest.raises(IndexError, match="out of range for 4 positions"):
        patch_effects(model, tokens, 3, replace_by=3, positions=[4])
    padded = FrozenModel(model, tokens, attention_mask=torch.tensor([[0, 1, 1, 1]]))
    with pytest.raises(ValueError, match="position 0 is padding"):
        patch_effects(padded, target=3, replace_by=3, positions=[0])
