"""Circuits of many prompts: each extracted on its own, divided among processes, saved as they are found.

# many.py
with torchrun():
    extract_many(model, coders, prompts, " hungry", "out/circuits")

torchrun --nproc-per-node 2 many.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from circuits.extract import extract_circuit
from circuits.faithfulness import Faithfulness
from circuits.files import TENSORS, graph_of, graph_parts
from circuits.graph import Graph
from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from hooked_mamba.pieces import Pieces, digest
from saes.coder import SparseCoder
from saes.coder_hash import coder_hash
from saes.naming import Coders, named_coders

REPORT = ("nodes", "circuit", "gradient", "random", "patching")
"""Figures of a report that are kept: nodes of the circuit, shares recovered by it, by gradient times activation and by
random nodes, and the rank correlation with patching."""


@dataclass(frozen=True)
class Found:
    """What is kept of one prompt."""

    graph: Graph
    """The pruned graph."""
    report: dict[str, float]
    """:data:`REPORT` -> its figure; empty without checks."""


def extract_many(
    model: HookedModel,
    coders: Coders | Iterable[SparseCoder],
    prompts: Sequence[Any],
    target: Any,
    folder: str | Path,
    *,
    progress: bool = True,
    **options: Any,
) -> list[Found]:
    """:func:`extract_circuit` of every prompt; under torchrun its processes share them.

    A stopped run continues when it is called again, with as many processes as there then are. The graphs do not depend
    on how many processes there were.

    Parameters
    ----------
    model, coders
        As in :func:`extract_circuit`.
    prompts
        Texts, or tokens of one prompt each.
    target
        What is explained in all prompts; or a function from a prompt's number to that.
    folder
        Of the results, a file for each prompt. Those of another model, other coders, prompts or options are refused
        there.
    options
        Of :func:`extract_circuit`.

    Raises
    ------
    PiecesError
        The folder holds other work.
    """
    if not isinstance(coders, SparseCoder | Mapping | str):
        coders = list(coders)
    named = named_coders(coders) if coders else {}
    tokens = [model.input_to_tokens(prompt)[0] for prompt in prompts]
    targets = [target(i) if isinstance(target, Callable) else target for i in range(len(prompts))]  # type: ignore[arg-type]
    about = {
        "circuits": {name: coder_hash(coder) for name, coder in named.items()},
        "model": model_hash(model),
        "prompts": [digest(one) for one in tokens],
        "targets": [repr(one) for one in targets],
        "options": {name: repr(value) for name, value in sorted(options.items())},
    }

    def work(i: int, prompt: Tensor) -> dict[str, Tensor]:
        return packed(*_extracted(model, list(named.values()), prompt, targets[i], options))

    Pieces(folder, about).run(tokens, work, total=len(tokens), progress=progress, description="circuits")
    return list(load_many(folder, about))


def load_many(folder: str | Path, about: Mapping[str, Any] | None = None) -> Iterator[Found]:
    """What :func:`extract_many` found, prompt by prompt, one in memory at a time.

    Raises
    ------
    PiecesError
        The work is not complete, or a file is damaged.
    ValueError
        A file holds no graph.
    """
    pieces = Pieces.opened(folder) if about is None else Pieces(folder, about)
    for found in pieces:
        yield unpacked(found, Path(folder))


def packed(graph: Graph, figures: Sequence[float]) -> dict[str, Tensor]:
    """A graph and its figures as tensors: its text is one of bytes."""
    text, tensors = graph_parts(graph)
    about = torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)
    return {"about": about, "report": torch.tensor(figures, dtype=torch.float64), **tensors}


def unpacked(found: Mapping[str, Tensor], folder: Path) -> Found:
    """The same back.

    Raises
    ------
    ValueError
        It is none.
    """
    missing = [name for name in ("about", "report", *TENSORS) if name not in found]
    if missing:
        raise ValueError(f"{folder} holds no circuits: a piece lacks {', '.join(missing)}")
    graph = graph_of(json.loads(found["about"].numpy().tobytes()), {name: found[name] for name in TENSORS}, folder)
    return Found(graph, dict(zip(REPORT, found["report"].tolist(), strict=False)))


def _extracted(
    model: HookedModel, coders: list[SparseCoder], prompt: Tensor, target: Any, options: Mapping[str, Any]
) -> tuple[Graph, Sequence[float]]:
    circuit = extract_circuit(model, coders, prompt, target, **options)
    return circuit.graph, () if circuit.report is None else _figures(circuit.report)


def _figures(report: Faithfulness) -> tuple[float, ...]:
    found = report.recovery
    random = sum(found.random) / max(len(found.random), 1)
    return (float(found.nodes), found.circuit, found.gradient, random, report.patching)
