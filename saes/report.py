"""The result of an evaluation: a table in the terminal, in a notebook, and JSON."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from hooked_mamba.display import table as html_table
from saes.options import check_keys, near

RECONSTRUCTION = ("mse", "fvu", "ev", "cosine", "norm_ratio")
SPARSITY = ("l0", "dead_share", "dense_share", "density")
LOSS = ("ce_clean", "ce_spliced", "kl")
ABLATION = ("ce_zero", "ce_mean", "ce_recovered_zero", "ce_recovered_mean")
METRICS = (*RECONSTRUCTION, *SPARSITY, *LOSS, *ABLATION)
"""Every figure by name. `density` is the histogram; the others are numbers."""

GROUPS: dict[str, tuple[str, ...]] = {
    "reconstruction": RECONSTRUCTION,
    "sparsity": SPARSITY,
    "loss": (*LOSS, *ABLATION),
    "ce": ("ce_clean", "ce_spliced"),
    "ce_recovered": ("ce_clean", "ce_spliced", *ABLATION),
}
"""Names for several of them."""


def chosen_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    """Metrics by name or group, in the order of METRICS; None: all.

    Raises
    ------
    ValueError
        An unknown name.
    """
    if metrics is None:
        return METRICS
    if isinstance(metrics, str):
        metrics = [metrics]
    chosen: set[str] = set()
    for name in metrics:
        if name not in METRICS and name not in GROUPS:
            raise ValueError(f"no metric is called {name!r}{near(str(name), [*METRICS, *GROUPS])}")
        chosen |= set(GROUPS.get(name, (name,)))
    return tuple(name for name in METRICS if name in chosen)


@dataclass(frozen=True)
class Scores:
    """Figures of one coder, or of all replaced together."""

    name: str
    about: str
    """What it is, in a line."""
    values: Mapping[str, float | None]
    """None where a figure has no meaning, such as the variance explained of what never changes."""
    edges: tuple[float, ...] = ()
    histogram: tuple[int, ...] = ()
    """Latents by log10 density, see `saes.metrics.sparsity`."""

    def __getitem__(self, metric: str) -> float | None:
        if metric not in self.values:
            raise KeyError(f"{self.name} has no figure {metric!r}{near(metric, list(self.values))}")
        return self.values[metric]


@dataclass(frozen=True)
class Report:
    """What :func:`saes.evaluate` found."""

    model: str
    tokens: int
    """Positions that reconstruction and sparsity were taken over."""
    predictions: int
    """Next tokens that losses were taken over."""
    coders: tuple[Scores, ...]
    together: Scores | None = None
    """All coders in the model's place at once."""

    def __getitem__(self, name: str) -> Scores:
        for scores in self.rows:
            if scores.name == name:
                return scores
        raise KeyError(f"no coder is called {name!r}{near(name, [s.name for s in self.rows])}")

    @property
    def rows(self) -> tuple[Scores, ...]:
        """Coders one by one, then all together."""
        return self.coders if self.together is None else (*self.coders, self.together)

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, fit for JSON."""
        values = dataclasses.asdict(self)
        return json.loads(json.dumps(values, allow_nan=False))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """What :meth:`to_dict` gave; an unknown key is an error that names the nearest one."""
        required = [f.name for f in dataclasses.fields(cls) if f.name != "together"]
        check_keys("a report", values, [*required, "together"], required)
        together = values.get("together")
        return cls(
            model=values["model"],
            tokens=values["tokens"],
            predictions=values["predictions"],
            coders=tuple(map(_scores, values["coders"])),
            together=None if together is None else _scores(together),
        )

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def save(self, path: str | Path) -> Path:
        """Write JSON."""
        path = Path(path)
        path.write_text(self.to_json() + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Report:
        """Read what :meth:`save` wrote."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    # Shown ---------------------------------------------------------------------------------------------------

    @property
    def caption(self) -> str:
        """What was measured, and on which data."""
        losses = f", {self.predictions:,} predictions" if self.predictions else ""
        return f"{self.model}: {self.tokens:,} positions{losses}"

    def tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """Heads and rows of two tables: how well coders do on activations, and what the model loses on them."""
        found = []
        for metrics in ((*RECONSTRUCTION, *SPARSITY), (*LOSS, *ABLATION)):
            there = [name for name in metrics if any(name in scores.values for scores in self.rows)]
            rows = [scores for scores in self.rows if set(there) & set(scores.values)]
            body = [[s.name, *(_number(s.values[m]) if m in s.values else "" for m in there)] for s in rows]
            if there:
                found.append((["coder", *there], body))
        return found

    def __rich__(self) -> Group:
        made = []
        for head, body in self.tables():
            made.append(Table())
            for i, name in enumerate(head):
                made[-1].add_column(Text(name), justify="right" if i else "left", no_wrap=True)
            for row in body:
                made[-1].add_row(*map(Text, row))
        return Group(Text(self.caption), *made)

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=240, no_color=True)
        console.print(self)
        lines = console.file.getvalue().splitlines()  # type: ignore[attr-defined]  # the StringIO above
        return "\n".join(line.rstrip() for line in lines)

    def _repr_html_(self) -> str:
        captions = (self.caption, "")
        shown = "".join(
            html_table(body, head, caption) for (head, body), caption in zip(self.tables(), captions, strict=False)
        )
        counted = [scores for scores in self.coders if scores.histogram]
        if counted:
            edges = counted[0].edges
            bins = [f"{low:g} to {high:g}" for low, high in pairwise(edges)]
            shown += html_table(
                ([scores.name, *scores.histogram] for scores in counted), ("coder", *bins), "Latents by log10 density"
            )
        return shown


def _scores(values: Mapping[str, Any]) -> Scores:
    names = [f.name for f in dataclasses.fields(Scores)]
    check_keys("a report's row", values, names, names[:3])
    lists: dict[str, Iterable[Any]] = {key: tuple(values.get(key, ())) for key in ("edges", "histogram")}
    return Scores(**{**values, **lists, "values": dict(values["values"])})


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}"
