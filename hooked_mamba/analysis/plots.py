"""Plots, one function each; all return a plotly Figure, and none opens a window or needs a network."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch
from torch import Tensor

FEW = 30
"""Rows, columns or bars up to which each has a tick of its own."""


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
        Labels; duplicates are kept apart (numbered internally, shown without numbers).
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
        layout: dict[str, Any] = {"title": name or None}  # an empty one would take room
        if labels is not None:
            layout |= {"tickmode": "array", "tickvals": list(range(len(labels))), "ticktext": shown(labels)}
        elif z.shape[axis == "xaxis"] <= FEW:
            layout |= {"tick0": 0, "dtick": 1}  # no half layers
        figure.update_layout({axis: layout})
    figure.update_layout(title=title or None, template="plotly_white", margin={"l": 70, "r": 20, "t": 50, "b": 70})
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
    """Labels as plotly should display them: line breaks and tabs made visible, markup escaped."""
    return [html.escape(str(label)).replace("\n", "⏎").replace("\t", "⇥") for label in labels]


def as_array(values: Tensor) -> np.ndarray:
    """A tensor for plotly."""
    return torch.as_tensor(values).detach().float().cpu().numpy()


def save_html(figure: go.Figure, path: str | Path) -> Path:
    """Write one file that needs no network: plotly's own script is inside."""
    path = Path(path)
    path.write_text(figure.to_html(include_plotlyjs=True, full_html=True), encoding="utf-8")
    return path


def hidden_attention_figure(
    cache: Any,
    layers: Sequence[int] | None = None,
    channels: Sequence[int] | None = None,
    row: int = 0,
    words: Sequence[str] | None = None,
) -> go.Figure:
    """Hidden attention maps with a slider over layers and channels (Mamba-2: heads); each layer's mean comes first.

    Parameters
    ----------
    cache
        Of a run.
    layers, channels
        None: all layers, and only the mean over channels.
    row
        Of the batch.
    words
        Token texts; default: from the cached tokens, if the model has a tokenizer.
    """
    model = cache.model
    chosen = range(model.cfg.n_layers) if layers is None else layers
    unit = "channel" if model.mixer(0).head_width is None else "head"
    maps, names = [], []
    for i in chosen:
        maps.append(cache.hidden_attention(i, average=True))
        names.append(f"layer {i}, mean")
        for c in channels or ():
            maps.append(cache.hidden_attention(i, c))
            names.append(f"layer {i}, {unit} {c}")
    maps = [m[row] if cache.has_batch_dim else m for m in maps]
    if words is None and "tokens" in cache:
        tokens = cache["tokens"]
        words = token_labels(model, tokens[row] if cache.has_batch_dim else tokens)
    figure = heatmap(maps[0], words, words, names[0], "source", "target")
    for values in maps[1:]:
        figure.add_trace(heatmap(values).data[0])
    for k, trace in enumerate(figure.data):
        trace.visible = k == 0
    steps = [
        {
            "label": name,
            "method": "update",
            "args": [{"visible": [j == k for j in range(len(maps))]}, {"title.text": name}],
        }
        for k, name in enumerate(names)
    ]
    figure.update_layout(sliders=[{"active": 0, "steps": steps, "pad": {"t": 60}}])
    figure.update_layout(height=int(min(1000, max(450, 230 + 24 * len(maps[0])))))
    return figure


def coloured_tokens(
    words: Sequence[str], values: Tensor, title: str = "", per_line: int = 12, zero_centred: bool = True
) -> go.Figure:
    """Tokens as running text, each with a background coloured by its value."""
    numbers = as_array(values).reshape(-1)
    if len(numbers) != len(words):
        raise ValueError(f"{len(words)} tokens, but {len(numbers)} values")
    lines = -(-len(words) // per_line)
    grid = np.full(lines * per_line, np.nan)
    grid[: len(numbers)] = numbers
    text = shown(words) + [""] * (lines * per_line - len(words))
    figure = heatmap(torch.as_tensor(grid).reshape(lines, per_line), title=title, zero_centred=zero_centred)
    figure.update_traces(
        text=np.array(text, dtype=object).reshape(lines, per_line),
        texttemplate="%{text}",
        hovertemplate="%{text}: %{z:.4g}<extra></extra>",
        xgap=2,
        ygap=6,
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    figure.update_layout(height=110 + 46 * lines, margin={"t": 50, "b": 20})
    return figure


def lens_figure(
    reading: Any, model: Any, labels: Sequence[str], words: Sequence[str] | None = None, row: int = 0
) -> go.Figure:
    """A lens: layer by position, coloured by the likeliest token's probability, with its text in the cell.

    Parameters
    ----------
    reading
        A `LensReading` over all positions.
    labels
        The layers' names.
    words
        The prompt's tokens.
    """
    tokens, probs = reading.tokens, reading.probs
    if tokens.ndim == 4:
        tokens, probs = tokens[:, row], probs[:, row]
    if tokens.ndim != 3:
        raise ValueError(f"a lens figure takes layer position k, got {list(tokens.shape)}")
    named = getattr(model, "tokenizer", None) is not None

    def text_of(token: int) -> str:
        return model.to_single_str_token(token) if named else str(token)

    text = [[shown([text_of(t)])[0] for t in line] for line in tokens[..., 0].tolist()]
    figure = heatmap(probs[..., 0], words, labels, "logit lens", "position", "", zero_centred=False)
    figure.update_traces(text=text, texttemplate="%{text}", hovertemplate="%{y}, %{x}: %{text} %{z:.1%}<extra></extra>")
    return figure


def bars(labels: Sequence[str], values: Tensor, title: str = "", top: int | None = 20) -> go.Figure:
    """Signed bars, the largest first; for attributions."""
    numbers = as_array(values).reshape(-1)
    if len(numbers) != len(labels):
        raise ValueError(f"{len(labels)} labels, but {len(numbers)} values")
    order = np.argsort(-np.abs(numbers))[:top]
    figure = go.Figure(go.Bar(x=numbers[order], y=shown([labels[i] for i in order]), orientation="h"))
    figure.update_layout(title=title, template="plotly_white")
    figure.update_yaxes(autorange="reversed")
    if len(order) <= FEW:
        figure.update_yaxes(dtick=1, automargin=True)
        figure.update_layout(height=max(240, 130 + 20 * len(order)))
    return figure


def lines(
    values: Tensor, names: Sequence[str] | None = None, x: Sequence[Any] | None = None, title: str = "", yaxis: str = ""
) -> go.Figure:
    """Curves over positions, one per row; for write survival, saliency and the like."""
    rows = as_array(values)
    rows = rows[None] if rows.ndim == 1 else rows
    figure = go.Figure()
    for k, row in enumerate(rows):
        name = shown([names[k]])[0] if names is not None else str(k)
        figure.add_trace(go.Scatter(y=row, x=None if x is None else list(range(len(row))), name=name))
    if x is not None:
        figure.update_xaxes(tickmode="array", tickvals=list(range(len(x))), ticktext=shown([str(v) for v in x]))
    figure.update_layout(title=title, template="plotly_white", yaxis_title=yaxis)
    return figure
