"""States and caches can be copied in every way in which people copy things, and go on as the original does."""

import copy
import io
import multiprocessing
import pickle

import pytest
import torch

from tests.hooked_mamba.hybrids import tiny as hybrids
from tests.hooked_mamba.recurrent import models as recurrent
from tests.hooked_mamba.tiny import build, tokens_for
from tests.kinds import MAMBA

FAMILIES = (*MAMBA, "rwkv7", "deltanet", "jamba", "lfm2")


def model_of(family):
    if family in recurrent.KINDS:
        return recurrent.build(family)
    return hybrids.tiny(family).model if family in hybrids.CASES else build(family)


def saved(value):
    stream = io.BytesIO()
    torch.save(value, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_states(family, way):
    model = model_of(family)
    tokens = tokens_for(model, length=9)
    _, state = model(tokens[:, :3], return_state=True)
    _, state = model(tokens[:, 3:5], initial_state=state, return_state=True)  # keys now stand in a growing buffer
    if way == "torch.save":
        state = state.detach()
    expected = model(tokens[:, 5:], initial_state=state)
    made = WAYS[way](state)
    assert type(made) is type(state)
    assert torch.equal(model(tokens[:, 5:], initial_state=made), expected)
    if way == "deepcopy":
        first = next(t for layer in made for t in layer)
        first.data += 1
        assert torch.equal(model(tokens[:, 5:], initial_state=state), expected), "a deep copy shares no memory"
        WAYS[way](state[0])


@pytest.mark.parametrize("way", ["copy", "deepcopy", "pickle"])
def test_caches(way):
    model = build("mamba")
    _, cache = model.run_with_cache(tokens_for(model))
    made = WAYS[way](cache)
    assert list(made) == list(cache)
    assert all(torch.equal(made[name], cache[name]) for name in cache)
    assert torch.equal(made.decompose_resid(), cache.decompose_resid())
    assert list(saved(dict(cache.items()))) == list(cache)


def _sum(state):
    return float(sum(t.double().sum() for layer in state for t in layer))


@pytest.mark.slow
def test_states_in_other_processes():
    model = build("mamba")
    with torch.no_grad():
        _, state = model(tokens_for(model), return_state=True)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(_sum, [state]) == [_sum(state)]
