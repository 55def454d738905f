"""The tour's heat maps, as plotly figures in the page's two themes."""

from __future__ import annotations

import html
from typing import Any

import plotly.graph_objects as go
from torch import Tensor

from demos.tour.measure import Tour
from hooked_mamba.analysis import plots

THEMES: dict[str, dict[str, Any]] = {
    "light": {
        "ink": "#22252a",
        "sequential": [[0, "#f1f0ec"], [0.5, "#7fa8a8"], [1, "#0d4a52"]],
        "diverging": [[0, "#b4430f"], [0.25, "#e0a07c"], [0.5, "#f1f0ec"], [0.75, "#8aa7d6"], [1, "#1f4fa3"]],
    },
    "dark": {
        "ink": "#d9dbde",
        "sequential": [[0, "#24272c"], [0.5, "#3f7d7d"], [1, "#a5e3d8"]],
        "diverging": [[0, "#ff9b63"], [0.25, "#9a5a35"], [0.5, "#24272c"], [0.75, "#42659b"], [1, "#8fb8ff"]],
    },
}
"""Colours that the page's script sets when the reader's theme changes. Orange lowers, blue raises, grey is none."""

CONFIG = {"displayModeBar": False, "responsive": True, "scrollZoom": False}


def visible(token: str) -> str:
    """A token as a label: its spaces and line ends shown, nothing in it taken for markup."""
    return html.escape(token.replace("\n", "↵").replace(" ", "·")) or "∅"


def heat_map(
    values: Tensor,
    columns: list[str],
    hover: list[list[str]],
    legend: str,
    rows: list[str] | None = None,
    diverging: bool = False,
    text: list[list[str]] | None = None,
) -> go.Figure:
    """Layers down, columns across.

    Parameters
    ----------
    values
        layer x column.
    columns, rows
        Labels; rows are layers unless said otherwise.
    hover, text
        What is shown over and in each cell.
    legend
        What the colour means, with its unit.
    diverging
        Whether 0 is the middle of the colours.
    """
    n_rows, light = values.shape[0], THEMES["light"]
    bound = max(float(values.abs().max()), 1e-6)
    figure = plots.heatmap(values, zero_centred=diverging)
    figure.update_traces(
        customdata=hover,
        hovertemplate="%{customdata}<extra></extra>",
        text=text,
        texttemplate="%{text}" if text else None,
        xgap=2,
        ygap=2,
        coloraxis="coloraxis",  # which the page's theme sets, instead of a scale of the trace's own
        colorscale=None,
        zmin=None,
        zmax=None,
    )
    figure.update_layout(
        height=110 + n_rows * max(14, min(44, 440 // n_rows)),
        margin={"l": 10, "r": 10, "t": 8, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13, "color": light["ink"]},
        dragmode=False,
        coloraxis={
            "colorscale": light["diverging" if diverging else "sequential"],
            "cmin": -bound if diverging else None,
            "cmax": bound if diverging else None,
            "colorbar": {
                "tickangle": 0,  # on narrow screens plotly would turn them, into the map
                "title": {"text": legend, "side": "top", "font": {"size": 12}},
                "orientation": "h",
                "x": 0,
                "xanchor": "left",
                "y": 1.02,
                "yanchor": "bottom",
                "len": 0.5,
                "thickness": 8,
                "ypad": 4,
                "outlinewidth": 0,
                "nticks": 4,
            },
        },
    )
    places = list(range(len(columns)))
    figure.update_xaxes(tickvals=places, ticktext=columns, showgrid=False, zeroline=False, fixedrange=True)
    figure.update_yaxes(
        tickvals=list(range(n_rows)),
        ticktext=rows or [f"layer {i}" for i in range(n_rows)],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
        fixedrange=True,
        automargin=True,
    )
    return figure


def state_norm(tour: Tour) -> go.Figure:
    """How large each layer's state is after each token."""
    hover = cells(tour.state_norm, tour, "norm of the state {value:.3g}")
    return heat_map(tour.state_norm, labels(tour), hover, "norm of the state")


def step_size(tour: Tour) -> go.Figure:
    """The mean step size at each token."""
    hover = cells(tour.dt, tour, "mean dt {value:.3g}")
    return heat_map(tour.dt, labels(tour), hover, "dt, mean over channels")


def wiped(tour: Tour) -> go.Figure:
    """What wiping the state of one layer after one token does to the prediction."""
    answer, before = visible(tour.predictions[0].token), tour.predictions[0].probability
    change, after = tour.wiped.log_probability, tour.wiped.probability
    rows = [*(f"layer {i}" for i in range(len(change) - 1)), "all layers"]
    hover = [
        [
            f"{row}, state wiped after <b>{token}</b><br>P({answer}) {before:.1%} → {float(after[i, t]):.1%}"
            f"<br>{float(change[i, t]):+.3f} nats"
            for t, token in enumerate(labels(tour))
        ]
        for i, row in enumerate(rows)
    ]
    return heat_map(change, labels(tour), hover, f"change of log P({answer}), nats", rows, diverging=True)


def silenced(tour: Tour) -> go.Figure:
    """What silencing each of the strongest channels does to the prediction."""
    answer, before = visible(tour.predictions[0].token), tour.predictions[0].probability
    change, after = tour.silenced.log_probability, tour.silenced.probability
    hover = [
        [
            f"layer {i}, channel {int(channel)} silenced<br>direct effect {float(tour.direct[i, j]):+.3f} logits"
            f"<br>P({answer}) {before:.1%} → {float(after[i, j]):.1%}<br>{float(change[i, j]):+.3f} nats"
            for j, channel in enumerate(row)
        ]
        for i, row in enumerate(tour.channels)
    ]
    ranks = [f"{j + 1}." for j in range(change.shape[1])]
    text = [[str(int(channel)) for channel in row] for row in tour.channels]
    return heat_map(change, ranks, hover, f"change of log P({answer}), nats", diverging=True, text=text)


def labels(tour: Tour) -> list[str]:
    """The tokens as column labels."""
    return [visible(token) for token in tour.tokens]


def cells(values: Tensor, tour: Tour, form: str) -> list[list[str]]:
    """Hover texts of a map of layers and tokens."""
    return [
        [
            f"layer {i}, <b>{token}</b><br>" + form.format(value=float(value))
            for token, value in zip(labels(tour), row, strict=True)
        ]
        for i, row in enumerate(values)
    ]
