"""What notebooks show: small HTML tables of models, caches and results. All text in them is escaped."""

from __future__ import annotations

import dataclasses
import html
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

LARGEST = (16, 24)
"""Rows and columns up to which a tensor is shown cell by cell."""


class Shown:
    """A dataclass of results that notebooks show as a table of its fields."""

    def _repr_html_(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]
        rows = "".join(
            f"<tr>{cell(field.name, 'th')}<td>{value_html(getattr(self, field.name))}</td></tr>" for field in fields
        )
        return f"<table><caption>{html.escape(type(self).__name__)}</caption>{rows}</table>"


def table(rows: Iterable[Sequence[Any]], head: Sequence[str] = (), caption: str = "") -> str:
    """Rows of text as an HTML table; the first cell of a row is its heading."""
    top = "".join(cell(name, "th") for name in head)
    body = "".join(
        "<tr>" + "".join(cell(text, "td" if i else "th") for i, text in enumerate(row)) + "</tr>" for row in rows
    )
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    return f"<table>{title}{f'<tr>{top}</tr>' if head else ''}{body}</table>"


def cell(text: Any, kind: str = "td") -> str:
    """One cell, aligned to the left."""
    return f'<{kind} style="text-align:left">{html.escape(str(text))}</{kind}>'


def folded(summary: str, body: str) -> str:
    """HTML that opens at a click on a line of text."""
    return f"<details><summary>{html.escape(summary)}</summary>{body}</details>"


def value_html(value: Any) -> str:
    """One value of a result: numbers in four digits, tensors by shape, and cell by cell where they are small."""
    if isinstance(value, Tensor):
        return tensor_html(value)
    if isinstance(value, bool | str | int) or value is None:
        return html.escape(str(value))
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        inside = ", ".join(value_html(part) for part in value[: LARGEST[0]])
        return f"({inside}{', …' if len(value) > LARGEST[0] else ''})"
    return html.escape(repr(value))


def tensor_html(value: Tensor) -> str:
    """Shape and range; a vector or matrix that is not large also as a table, darker where it is further from 0."""
    with torch.no_grad():
        value = value.detach().cpu()
        shape = " × ".join(map(str, value.shape)) or "one number"
        if value.numel() == 0:
            return f"{shape}, empty"
        numbers = value.double()
        finite = numbers[numbers.isfinite()]
        limit = float(finite.abs().max()) if finite.numel() else 0.0
        extent = f"{float(finite.min()):.4g} to {float(finite.max()):.4g}" if finite.numel() else "nothing finite"
    summary = f"{shape}, {extent}"
    if value.ndim not in (1, 2):
        return html.escape(summary)
    matrix = numbers if value.ndim == 2 else numbers[None]
    if any(size > most for size, most in zip(matrix.shape, LARGEST, strict=True)):
        return html.escape(summary)
    whole = not value.is_floating_point()
    rows = "".join("<tr>" + "".join(_number_cell(x, limit, whole) for x in row) + "</tr>" for row in matrix.tolist())
    return f"{html.escape(summary)}<table>{rows}</table>"


def _number_cell(x: float, limit: float, whole: bool) -> str:
    share = abs(x) / limit if limit and not whole and abs(x) <= limit else 0.0
    colour = "214,96,77" if x > 0 else "67,147,195"
    text = f"{x:.0f}" if whole else f"{x:.3g}"
    return f'<td style="background:rgba({colour},{0.6 * share:.2f})">{text}</td>'


def model_html(model: Any) -> str:
    """A model: what shapes it, its parameters, its blocks and its sites."""
    cfg = model.cfg
    parameters = list(model.parameters())
    count = sum(p.numel() for p in parameters)
    nbytes = sum(p.numel() * p.element_size() for p in parameters)
    kinds = ", ".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters}))
    default = len(model.default_names())
    layers = Counter(" + ".join(type(branch).__name__ for branch in block.branches.values()) for block in model.blocks)
    rows = [
        ("width d", cfg.d_model),
        *dict.fromkeys(fact for block in model.blocks for branch in block.branches.values() for fact in branch.facts()),
        ("vocabulary V", f"{cfg.d_vocab:,}" + (", tied" if cfg.tie_embeddings else "")),
        ("blocks", ", ".join(f"{n} × [norm, {branches}]" for branches, n in layers.items())),
        ("parameters", f"{count:,} ({nbytes / 2**20:,.1f} MiB, {kinds}, {model.device})"),
        ("tokenizer", type(model.tokenizer).__name__ if model.tokenizer is not None else "none"),
        ("sites", f"{len(model.hook_dict)}, {default} of them in a cache without a filter"),
    ]
    weights = table(
        ((name, list(p.shape), str(p.dtype).removeprefix("torch.")) for name, p in model.named_parameters()),
        ("parameter", "shape", "dtype"),
    )
    sites = table(((name,) for name in model.hook_dict), ("site",))
    fields = table(((f.name, getattr(cfg, f.name)) for f in dataclasses.fields(cfg)), ("field", "value"))
    title = f"{type(model).__name__}: {cfg.model_name}"
    return (
        table(rows, caption=title) + folded("config", fields) + folded("parameters", weights) + folded("sites", sites)
    )


def cache_html(cache: Any) -> str:
    """A cache: its sites with their shapes."""
    rows = ((name, list(value.shape), str(value.dtype).removeprefix("torch.")) for name, value in cache.items())
    return folded(repr(cache), table(rows, ("site", "shape", "dtype")))
