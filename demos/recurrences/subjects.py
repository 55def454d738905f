"""The models that are compared, and prompts for them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from demos.localisation.families import TITLES, build_model
from demos.localisation.options import Options
from demos.localisation.study import MODELS, load
from demos.localisation.task import Task
from hooked_mamba import HookedModel
from hooked_mamba.analysis import tasks
from hooked_mamba.analysis.tasks import Prompts
from hooked_mamba.state import BranchState

KEYS = VALUES = 16
"""Tokens 0 to 15 are keys, 16 to 31 values."""
PAIRS = 8
"""Pairs of a prompt: the most of training, in which Mamba-3 saw 6."""


@dataclass(frozen=True)
class Subject:
    """One recurrence: its model of recall, the same before training, and its model of induction."""

    title: str
    model: HookedModel
    untrained: HookedModel
    induction: HookedModel
    induction_task: Task

    @property
    def state_numbers(self) -> int:
        """Numbers of one layer's state."""
        mixer = self.model.mixer(0)
        before: BranchState = mixer.initial_state(1, "meta")
        state = mixer.memory(before)
        assert state is not None  # all of them have one
        return state.numel()


def subjects(folder: Path = MODELS) -> list[Subject]:
    """The models of each recurrence, in the order of their publication."""
    found = []
    for family, title in TITLES.items():
        (model, task), (induction, other) = (
            load(folder / Options(task=name, family=family, out=folder).name) for name in ("recall", "induction")
        )
        untrained = build_model(family, model.cfg.d_model, model.cfg.n_layers, 16, task.vocab, f"untrained {title}", 0)
        models = (m.eval().requires_grad_(False) for m in (model, untrained, induction))
        found.append(Subject(title, *models, other))
    return found


def recall(n: int, pairs: int, seed: int = 0) -> Prompts:
    """Pairs, then one question."""
    return tasks.associative_recall(n, pairs, KEYS, VALUES, seed)


def asked_late(n: int, questions: int, seed: int = 0) -> Prompts:
    """Eight pairs, questions about seven of them with the right answers, then at last the eighth's key."""
    first = recall(n, PAIRS, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    rows = torch.arange(n)[:, None]
    mine = (first.where // 2)[:, None]
    other = (mine + torch.randint(1, PAIRS, (n, questions), generator=generator)) % PAIRS
    body = first.tokens[:, :-1]
    asked = torch.stack([body[rows, 2 * other], body[rows, 2 * other + 1]], -1).flatten(1)
    return Prompts(torch.cat([body, asked, first.tokens[:, -1:]], 1), first.answers, first.where)


@dataclass(frozen=True)
class Rewritten:
    """Prompts in which one key comes twice, with another value the second time."""

    tokens: Int[Tensor, "b l"]
    new: Int[Tensor, " b"]
    old: Int[Tensor, " b"]
    second: Int[Tensor, " b"]
    """The position of the new value."""


def rewritten(n: int, seed: int = 0) -> Rewritten:
    """Seven pairs, the first of whose keys comes again with a new value in one of the last places; then it is asked."""
    prompts = recall(n, PAIRS, seed)
    body = prompts.tokens[:, :-1].clone()
    generator = torch.Generator().manual_seed(seed + 1)
    place = torch.randint(1, PAIRS, (n,), generator=generator)
    rows = torch.arange(n)
    body[rows, 2 * place] = prompts.tokens[:, 0]
    tokens = torch.cat([body, body[:, :1]], 1)
    return Rewritten(tokens, body[rows, 2 * place + 1], body[:, 1], 2 * place + 1)
