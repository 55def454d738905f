"""What the tables hold: accuracies, effects of knockouts, and a logit taken apart into branches, heads and experts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demos.hybrid.knockouts import Hooks, Knockout, knockouts
from demos.localisation.stats import Rate
from demos.localisation.task import Task
from hooked_mamba import HookedHybrid
from hooked_mamba.analysis.tasks import Prompts

MODELS = Path(__file__).with_name("models")
NAMES = ("hybrid", "state", "wide")
SIZES = (2, 4, 8, 16, 24, 32)
"""Pairs of a prompt."""
SEED = 7
"""Of prompts; no training step uses a seed below 2**32."""
BY_SITE = ("hook_resid_pre", "hook_resid_mid", "hook_resid_post", "_out", "hook_scale", "hook_z")
BY_SITE += ("hook_expert_weights", "hook_expert_indices")
"""What a logit is taken apart from."""


class Score(NamedTuple):
    """How well prompts were answered."""

    right: Rate
    nats: float
    """Mean log P(answer)."""


def load(name: str) -> tuple[HookedHybrid, Task]:
    """One of the models that come with the demo, and its task."""
    return HookedHybrid.from_pretrained(MODELS / name).requires_grad_(False), Task.load(MODELS / name)


def task_of(task: Task, pairs: int) -> Task:
    """The same task with prompts of so many pairs."""
    return Task(task.name, pairs, task.vocab)


@torch.no_grad()
def score(model: HookedHybrid, prompts: Prompts, hooks: Hooks | None = None) -> Score:
    """The answers' share and log probability, with hooks."""
    with model.hooks(fwd_hooks=hooks or []):
        logits = model(prompts.tokens)[:, -1]
    right = int((logits.argmax(-1) == prompts.answers).sum())
    nats = logits.log_softmax(-1).gather(1, prompts.answers[:, None]).mean()
    return Score(Rate(right, len(prompts)), float(nats))


def by_size(model: HookedHybrid, task: Task, n: int) -> list[Score]:
    """Of prompts of every size."""
    return [score(model, task_of(task, pairs).prompts(n, SEED)) for pairs in SIZES]


def by_age(model: HookedHybrid, task: Task, n: int, groups: int = 4) -> list[Rate]:
    """Of prompts of full size, by how long ago the answer was read: equal parts of the pairs, the oldest first."""
    prompts = task.prompts(n, SEED)
    with torch.no_grad():
        right = model(prompts.tokens)[:, -1].argmax(-1) == prompts.answers
    part = (prompts.where // 2) * groups // task.size
    return [Rate(int(right[part == g].sum()), int((part == g).sum())) for g in range(groups)]


def knocked_out(
    model: HookedHybrid, prompts: dict[int, Prompts], wanted: Callable[[Knockout], bool] = lambda one: True
) -> list[tuple[Knockout, dict[int, Score]]]:
    """Every knockout's scores, by pairs of a prompt."""
    return [
        (one, {pairs: score(model, these, one.hooks) for pairs, these in prompts.items()})
        for one in knockouts(model)
        if wanted(one)
    ]


def direction(model: HookedHybrid, prompts: Prompts) -> Float[Tensor, "b d"]:
    """logit(answer) less the mean logit of the prompt's other values, as a direction in the normed stream."""
    W_U = model.W_U.t() * model.logit_multiplier
    values = W_U[prompts.tokens[:, 1:-1:2]]
    answer = W_U[prompts.answers]
    others = (values.sum(1) - answer) / (values.shape[1] - 1)
    return answer - others


@torch.no_grad()
def lead(model: HookedHybrid, prompts: Prompts) -> Float[Tensor, " b"]:
    """The same from the logits."""
    logits = model(prompts.tokens)[:, -1]
    values = logits.gather(1, prompts.tokens[:, 1:-1:2])
    answer = logits.gather(1, prompts.answers[:, None])[:, 0]
    return answer - (values.sum(1) - answer) / (values.shape[1] - 1)


@torch.no_grad()
def taken_apart(model: HookedHybrid, prompts: Prompts) -> dict[str, Float[Tensor, " b"]]:
    """The lead at the question as a sum: the embedding, then every branch of every block.

    Attention comes as its heads and experts as each expert; parts add up to the lead of the logits. All in float64.
    """
    double = HookedHybrid.from_config(model.cfg).double()
    double.load_state_dict(model.state_dict())
    names = [name for name in double.hook_dict if name.endswith(BY_SITE)]
    _, cache = double.run_with_cache(prompts.tokens, names_filter=names)
    onto = direction(double, prompts)
    whole, labels = cache.decompose_resid(apply_ln=True, pos_slice=-1, return_labels=True)
    parts = dict(zip(labels, (whole * onto).sum(-1), strict=True))
    finer: dict[str, dict[str, Tensor]] = {}
    for kind, stack in (("attn", cache.stack_head_results), ("moe", cache.stack_expert_results)):
        if not any(kind in double.block(i).branches for i in range(double.cfg.n_layers)):
            continue
        options: dict[str, Any] = {"kind": "attn"} if kind == "attn" else {}
        units, unit_labels = stack(apply_ln=True, pos_slice=-1, return_labels=True, **options)
        for label, unit in zip(unit_labels, units, strict=True):
            layer, number = label[1:].split("H" if kind == "attn" else "E")
            name = f"{layer}: {'head' if kind == 'attn' else 'expert'} {number}"
            finer.setdefault(f"{layer}_{kind}_out", {})[name] = (unit * onto).sum(-1)
    found: dict[str, Tensor] = {}
    for label, value in parts.items():
        found |= finer.get(label, {label: value})
    return found


@torch.no_grad()
def looked_at(model: HookedHybrid, prompts: Prompts, layer: int) -> Float[Tensor, "b head l"]:
    """The question's row of attention's pattern."""
    name = f"blocks.{layer}.attn.hook_pattern"
    return model.run_with_cache(prompts.tokens, names_filter=name)[1][name][:, :, -1]


def at(rows: Float[Tensor, "b head l"], where: Int[Tensor, " b"]) -> Float[Tensor, "b head"]:
    """Each row's entry at its own position."""
    return rows.gather(-1, where[:, None, None].expand(-1, rows.shape[1], 1))[..., 0]
