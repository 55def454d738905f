"""Keys and values that grow: in place for the state that owns the end, copied for every other."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba.mixers.kv_state import KVState, remember


def columns(n: int, start: int = 0) -> KVState:
    numbers = torch.arange(start, start + n).float().reshape(1, n, 1, 1)
    return KVState(numbers, -numbers, torch.ones(1, n, dtype=torch.bool))


def keys(state: KVState) -> list[float]:
    return state.k.flatten().tolist()


@torch.no_grad()
def test_the_owner_of_the_end_appends_in_place_until_there_is_no_room():
    state, moved = columns(4), 0
    for t in range(4, 300):
        before = state.k.data_ptr()
        state = remember(state, columns(1, t))
        moved += state.k.data_ptr() != before
        assert keys(state) == list(range(t + 1))
    assert moved <= 5


@torch.no_grad()
@pytest.mark.parametrize("how", ["itself", "mapped", "rows"])
def test_no_other_state_does(how):
    start = remember(columns(3), columns(1, 3))
    first = remember(start, columns(2, 100))
    again = {"itself": start, "mapped": KVState(*start), "rows": KVState(*(t[[0]] for t in start))}[how]
    second = remember(again, columns(2, 200))
    third = remember(start, columns(1, 300))
    assert keys(start) == [0, 1, 2, 3]
    assert keys(first) == [0, 1, 2, 3, 100, 101]
    assert keys(second) == [0, 1, 2, 3, 200, 201]
    assert keys(third) == [0, 1, 2, 3, 300]
    assert keys(remember(first, columns(1, 7))) == [0, 1, 2, 3, 100, 101, 7]


def test_gradients_reach_every_call():
    a, b = (torch.randn(1, n, 1, 2, requires_grad=True) for n in (3, 2))
    state = remember(
        KVState(a, a, torch.ones(1, 3, dtype=torch.bool)), KVState(b, b, torch.ones(1, 2, dtype=torch.bool))
    )
    state = remember(state, KVState(b, b, torch.ones(1, 2, dtype=torch.bool)))
    state.k.square().sum().backward()
    assert torch.equal(a.grad, 2 * a)
    assert torch.equal(b.grad, 4 * b)
