"""A run that computes the inside of blocks again gives what one that keeps everything gives, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from circuits import Channel, FrozenModel, Logit, attribute, build_graph
from hooked_mamba.frozen import run as run_module
from tests.circuits.models import random_model
from tests.hooked_mamba.hybrids.tiny import SOME, tiny, tokens_for
from tests.hooked_mamba.tiny import build
from tests.kinds import RECURRENCES


def both(model: Any, tokens: Tensor, **run: Any) -> tuple[FrozenModel, FrozenModel]:
    """The same run, everything kept and computed again."""
    frozen = [FrozenModel(model, tokens, recompute=again, **run) for again in (False, True)]
    assert [one.recomputes for one in frozen] == [False, True]
    return frozen[0], frozen[1]


def assert_equal(a: Any, b: Any) -> None:
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, Tensor):
            assert torch.equal(value, other), name
        elif name not in ("labels", "codes"):
            assert {**value}.keys() == {**other}.keys(), name
            assert all(torch.equal(part, other[key]) for key, part in value.items()), name


@pytest.mark.parametrize("start", ["empty", "padded", "going on"])
@pytest.mark.parametrize("kind", RECURRENCES)
def test_all_parts_are_equal(kind: str, start: str) -> None:
    model, run = build(kind).double(), {}
    tokens = torch.arange(12).reshape(2, 6) % 11 + 1
    if start == "padded":
        run = {"attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    elif start == "going on":
        run = {"initial_state": model(tokens[:, :3], return_state=True)[1]}
    kept, again = both(model, tokens, **run)
    targets = [Logit(3), Logit(2, -2, minus=4), Channel(0, 1, 4)]
    mine, theirs = attribute(again, targets=targets), attribute(kept, targets=targets)
    assert torch.allclose(again.logits, kept.logits, atol=1e-12, rtol=0)
    mine.target, theirs.target = mine.target.round(decimals=12), theirs.target.round(decimals=12)
    assert_equal(theirs, mine)


@pytest.mark.parametrize("case", SOME)
def test_hybrids_too(case: str) -> None:
    kept, again = both(tiny(case).model, tokens_for(length=6))
    mine, theirs = attribute(again, targets=Logit(3)), attribute(kept, targets=Logit(3))
    mine.target, theirs.target = mine.target.round(decimals=12), theirs.target.round(decimals=12)
    assert_equal(theirs, mine)


def test_graphs_are_equal_and_one_block_is_held_at_a_time() -> None:
    model = random_model(3, "mamba", n_layers=3)
    kept, again = both(model, torch.tensor([[1, 5, 2, 7, 3]]))
    graphs = [build_graph(frozen, Logit(4), max_heads=15) for frozen in (kept, again)]
    assert [node.key for node in graphs[0].nodes] == [node.key for node in graphs[1].nodes]
    assert torch.equal(graphs[0].weights, graphs[1].weights)
    held = {again.branch_of(part)[0] for part in again._chains}
    assert len(held) == 1 < len({kept.branch_of(part)[0] for part in kept._chains})


def test_long_prompts_are_computed_again_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = build("mamba"), torch.arange(1, 9)[None]
    assert not FrozenModel(model, tokens).recomputes
    monkeypatch.setattr(run_module, "WHOLE", 1000)
    assert FrozenModel(model, tokens).recomputes
    with model.hooks([("blocks.0.mixer.hook_x", lambda x, hook: 2 * x)]):
        assert not FrozenModel(model, tokens).recomputes  # what a function does twice may differ
        with pytest.raises(ValueError, match=r"functions sit on blocks\.0\.mixer\.hook_x"):
            FrozenModel(model, tokens, recompute=True)
