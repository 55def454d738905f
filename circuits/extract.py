"""From a prompt to a pruned graph and its report, in one call."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from circuits.build import build_graph
from circuits.coded_layer import LayerMode
from circuits.faithfulness import Faithfulness, faithfulness
from circuits.frozen_model import FrozenModel
from circuits.graph import Graph
from circuits.influence import Scores, prune, scores, thin
from circuits.integrated import node_effects
from circuits.paths import Paths, top_paths
from circuits.rules import Selection, rule_of
from circuits.targets import Logit, Metric, Target, chosen_targets, top_logits
from hooked_mamba.frozen.places import Part
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.naming import Coders


@dataclass(frozen=True)
class Circuit:
    """What :func:`extract_circuit` found."""

    frozen: FrozenModel
    targets: list[Target]
    whole: Graph
    """Before pruning."""
    graph: Graph
    scores: Scores
    """Of the whole graph."""
    paths: Paths
    """The largest paths of the first target in the whole graph."""
    report: Faithfulness | None

    def __str__(self) -> str:
        lines = [
            repr(self.graph),
            f"replacement {self.scores.replacement:.2f}, completeness {self.scores.completeness:.2f} (before pruning)",
            str(self.paths),
        ]
        return "\n".join([*lines, *([str(self.report)] if self.report is not None else [])])


def extract_circuit(
    model: HookedModel,
    coders: Coders | Iterable[SparseCoder],
    prompt: str | Sequence[Any] | Tensor,
    target: Target | str | int | Sequence[Any] | None = None,
    budget: int = 200,
    *,
    mode: LayerMode | Mapping[Part, LayerMode] | None = None,
    metric: Metric | None = None,
    reference: FrozenModel | Sequence[Any] | Tensor | None = None,
    choose: str = "influence",
    selection: Selection = "none",
    units: Collection[str] | None = None,
    prune_nodes: float = 0.8,
    prune_edges: float = 0.98,
    check: bool = True,
    verbose: bool = False,
) -> Circuit:
    """Trace, prune and check.

    Parameters
    ----------
    model, coders, mode
        As in :class:`FrozenModel`; without coders every layer is a mixer.
    prompt
        One text, or its tokens.
    target
        A token (text or id) whose logit at the last position is explained, a target, or several. None: the most
        likely next tokens (:func:`top_logits`).
    budget
        Most features and heads in the pruned graph.
    metric
        What the checks measure, from logits b l V to a number per row; None: the first target, if it is a logit.
    reference
        Prompts of the same length for ablation and patching, see :func:`faithfulness`.
    choose
        How nodes are chosen. "influence": by their share of the graph's paths. "integrated": by what ablating them
        does to the metric in the real model (:func:`node_effects`), which sees selection and gates too; some then
        have no edge unless `selection` follows these.
    selection, units
        What paths follow, and branches whose units may be nodes, see :class:`FrozenModel`.
    prune_nodes, prune_edges
        See :func:`prune`; the budget bounds the nodes as well. "integrated" prunes edges alone.
    check
        Whether to run the interventions.

    Raises
    ------
    ValueError
        More than one prompt, no target, a budget below 1, an unknown choice, or no metric for a target that is no
        logit.
    """
    check_choices(budget, choose, selection)
    frozen = FrozenModel(model, prompt, coders, mode, selection=selection, units=units)
    targets = _targets(frozen, target)
    if reference is not None and not isinstance(reference, FrozenModel):
        reference = FrozenModel(model, reference, [coded.coder for coded in frozen.coded.values()], mode, units=units)
    measure = metric or (_metric(frozen, targets[0]) if check or choose == "integrated" else None)
    if choose == "integrated":
        assert measure is not None  # made above
        keep = node_effects(frozen, measure, reference=reference).largest(budget)
        whole = build_graph(frozen, targets, keep=keep, verbose=verbose)
        graph = thin(whole, prune_edges)
    else:
        whole = build_graph(frozen, targets, max_features=2 * budget, max_heads=budget, verbose=verbose)
        graph = within(whole, budget, prune_nodes, prune_edges)
    report = None
    if check:
        assert measure is not None
        report = faithfulness(frozen, whole, graph, targets, measure, reference=reference)
    return Circuit(frozen, targets, whole, graph, scores(whole), top_paths(whole), report)


def check_choices(budget: int, choose: str, selection: Selection) -> None:
    """Raise ValueError for what :func:`extract_circuit` refuses whatever the model is."""
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    if choose not in ("influence", "integrated"):
        raise ValueError(f"choose must be 'influence' or 'integrated', got {choose!r}")
    rule_of(selection)


def within(graph: Graph, budget: int, nodes: float = 0.8, edges: float = 0.98) -> Graph:
    """Prune to the shares asked for, and on until at most `budget` features and heads are left."""
    while True:
        found = prune(graph, nodes, edges).graph
        if int(found.where("feature", "head").sum()) <= budget:
            return found
        nodes *= 0.95


def _targets(frozen: FrozenModel, target: Any) -> list[Target]:
    if target is None:
        return list(top_logits(frozen))
    several = list(target) if isinstance(target, list | tuple) else [target]
    return chosen_targets([one if isinstance(one, Target) else Logit(one) for one in several])


def _metric(frozen: FrozenModel, target: Target) -> Metric:
    if not isinstance(target, Logit):
        raise ValueError(
            f"no metric for {target.label}: pass metric= for the checks and choose='integrated', or do without both"
        )

    def measure(logits: Tensor) -> Tensor:
        at = logits[:, frozen.column(target.position, 0)]
        value = target.of(at, frozen)
        return value - torch.logsumexp(at, -1) if target.minus is None else value

    return measure
