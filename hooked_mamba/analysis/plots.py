"""Plots, one function each; all return a plotly Figure, none opens a window or needs a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor


def heatmap(
    values: Tensor,
    x: Sequence[str] | None = None,
    y: Sequence[str] | None = None,
    title: str = "",
    xaxis: str = "",
    yaxis: str = "",
    zero_centred: bool = True,
) -> go.Figure:
    """A matrix as colours, rows from the top.

    Parameters
    ----------
    values
        rows columns.
    x, y
        Labels; equal ones stay apart (they are numbered in the axis, and shown bare).
    zero_centred
        White at 0, red above, blue below; else from light to dark.
    """
    z = as_array(values)
    if z.ndim != 2:
        raise ValueError(f"a heat map takes a matrix, got {list(z.shape)}")
    limit = float(np.nanmax(np.abs(z), initial=0)) or 1.0
    colours = {"colorscale": "RdBu_r", "zmin": -limit, "zmax": limit} if zero_centred else {"colorscale": "Blues"}
    figure = go.Figure(go.Heatmap(z=z, hovertemplate="%{y}, %{x}: %{z:.4g}<extra></extra>", **colours))
    for axis, labels, name in (("xaxis", x, xaxis), ("yaxis", y, yaxis)):
        layout: dict[str, Any] = {"title": name}
        if labels is not None:
            layout |= {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": shown(labels)}
        figure.update_layout({axis: layout})
    figure.update_layout(title=title, template="plotly_white", margin={"l": 70, "r": 20, "t": 50, "b": 70})
    figure.update_yaxes(autorange="reversed")
    return figure


def patching_figure(
    result: Tensor, axes: Sequence[str], name: str, model: Any = None, tokens: Tensor | None = None
) -> go.Figure:
    """A patching sweep as a heat map; axes after the second are averaged, and a single one is a row."""
    values = result.detach()
    while values.ndim > 2:
        values = values.mean(-1)
    values = values[None] if values.ndim == 1 else values
    labels: list[str] | None = None
    if len(axes) > 1 and axes[1] == "pos" and tokens is not None:
        labels = token_labels(model, tokens)
    return heatmap(
        values,
        x=labels,
        title=f"patching {name}",
        xaxis=axes[1] if len(axes) > 1 else axes[0],
        yaxis=axes[0],
        zero_centred=bool((values < 0).any()),
    )


def token_labels(model: Any, tokens: Tensor) -> list[str]:
    """Each position's token where all rows agree, else "*"; positions alone where there is no tokenizer."""
    rows = tokens if tokens.ndim == 2 else tokens[None]
    if getattr(model, "tokenizer", None) is None:
        return [str(t) for t in range(rows.shape[1])]
    words = model.to_str_tokens(rows[0])
    same = (rows == rows[0]).all(0).tolist()
    return [f"{word if agree else '*'} {t}" for t, (word, agree) in enumerate(zip(words, same, strict=True))]


def shown(labels: Sequence[str]) -> list[str]:
    """Labels with their white space made visible."""
    return [str(label).replace("\n", "⏎").replace("\t", "⇥") for label in labels]


def as_array(values: Tensor) -> np.ndarray:
    """A tensor for plotly."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write one file that needs no network: plotly's own script is inside."""
    path = Path(path)
    path.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
    return path
