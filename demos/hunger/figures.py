"""The page's figures, in colours that stand on light paper and on dark."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go
import torch

from demos.hunger.stages import Found
from demos.studies.report import Plot, layer_map
from demos.tour.charts import visible

CUE, OTHER, QUIET, MARK = "#d0702e", "#4d86b8", "rgba(140,144,150,0.75)", "#2a9187"
GRID = "rgba(140,144,150,0.25)"


def plain(figure: go.Figure, height: int, x: str, y: str = "") -> go.Figure:
    """Axes and margins as the other pages have them."""
    figure.update_layout(
        height=height,
        margin={"l": 10, "r": 10, "t": 34, "b": 10},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        dragmode=False,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "itemsizing": "constant"},
    )
    figure.update_xaxes(title=x, gridcolor=GRID, zeroline=False, fixedrange=True, automargin=True)
    figure.update_yaxes(title=y, gridcolor=GRID, zeroline=False, fixedrange=True, automargin=True)
    return figure


def activations(scored: Found) -> Plot:
    """The latent at the last token of every scored sentence: sentences of one frame in a row."""
    frames = scored["frames"]
    figure = go.Figure()
    for kind, colour, shift in (("cue", CUE, 0.14), ("other", OTHER, -0.14)):
        values, texts = scored["activations"][kind], scored["sentences"][kind]
        figure.add_scatter(
            x=values,
            y=[frame + shift for frame in frames],
            mode="markers",
            marker={"color": colour, "size": 9, "opacity": 0.65},
            name={"cue": "with a cue", "other": "without"}[kind],
            text=[visible(text).replace("·", " ") for text in texts],
            hovertemplate="%{text}<br>%{x:.3f}<extra></extra>",
        )
    n = max(frames) + 1
    plain(figure, 120 + 52 * n, "activation at the last token")
    figure.update_yaxes(tickvals=list(range(n)), ticktext=[f"frame {i + 1}" for i in range(n)], autorange="reversed")
    return Plot(figure, "sequential")


def beside_controls(rows: list[Found], value: str, title: str, percent: bool = False) -> Plot:
    """By strength: the latent with its interval, and each of its controls.

    Parameters
    ----------
    value
        The key of the latent's interval in a row.
    """
    figure = go.Figure()
    for place, row in enumerate(rows):
        spread = torch.linspace(-0.2, 0.2, len(row["random"])).tolist()
        figure.add_scatter(
            x=[place + by for by in spread],
            y=sorted(row["random"]),
            mode="markers",
            marker={"color": QUIET, "size": 6},
            name="random latents",
            showlegend=not place,
            hovertemplate="%{y:.3f}<extra>a random latent</extra>",
        )
    found = [row[value] for row in rows]
    figure.add_scatter(
        x=list(range(len(rows))),
        y=[one["value"] for one in found],
        error_y={
            "type": "data",
            "symmetric": False,
            "array": [one["high"] - one["value"] for one in found],
            "arrayminus": [one["value"] - one["low"] for one in found],
            "color": CUE,
        },
        mode="markers",
        marker={"color": CUE, "size": 12, "symbol": "diamond"},
        name="the latent",
        hovertemplate="%{y:.3f}<extra>the latent</extra>",
    )
    plain(figure, 340, "times its natural maximum", title)
    figure.update_xaxes(tickvals=list(range(len(rows))), ticktext=[f"× {row['times']}" for row in rows])
    figure.update_yaxes(tickformat="+.0%" if percent else "+.2f", zeroline=True, zerolinecolor=GRID)
    return Plot(figure, "sequential")


KINDS: dict[str, dict[str, Any]] = {
    "other tokens": {"color": QUIET, "size": 2.5},
    "nearest to the latent": {"color": OTHER, "size": 3},
    "other words": {"color": "#8f6bb0", "size": 4},
    "words with a cue": {"color": MARK, "size": 5},
    "the word": {"color": "#c0392b", "size": 8},
    "the latent": {"color": CUE, "size": 9, "symbol": "diamond"},
}


def picture(found: Found) -> Plot:
    """Tokens and the latent's decoder row in three dimensions."""
    figure = go.Figure()
    for kind, marker in KINDS.items():
        points = [point for point in found["points"] if point["kind"] == kind]
        labels = [visible(point["label"]) for point in points]
        named = kind in ("the word", "the latent")
        x, y, z = ([point["xyz"][axis] for point in points] for axis in range(3))
        figure.add_scatter3d(
            x=x,
            y=y,
            z=z,
            mode="markers+text" if named else "markers",
            text=labels,
            textfont={"size": 11},
            marker={**marker, "line": {"width": 0}},
            name=kind,
            hovertemplate="%{text}<extra>" + kind + "</extra>",
        )
    plain(figure, 560, "")
    axis = {"showticklabels": False, "title": "", "gridcolor": GRID, "zeroline": False, "showbackground": False}
    how = {"umap": "UMAP, cosine distances", "pca": "PCA (umap-learn is not installed)"}[found["method"]]
    figure.update_layout(
        scene={
            "xaxis": axis,
            "yaxis": axis,
            "zaxis": axis,
            "dragmode": "turntable",
            "aspectmode": "cube",
            "camera": {"eye": {"x": 1.15, "y": 1.15, "z": 0.7}},
        },
        dragmode="turntable",
        title={"text": how, "font": {"size": 13}, "x": 0, "y": 0.02, "yanchor": "bottom"},
        margin={"l": 0, "r": 0, "t": 34, "b": 24},
    )
    return Plot(figure, "sequential")


def tokens_map(circuit: Found) -> Plot:
    """What each token's embedding adds to the latent, by all paths."""
    plot = layer_map(
        torch.tensor([circuit["embeddings"]]),
        circuit["tokens"],
        "added to the latent's pre-activation",
        rows=["all paths"],
    )
    plot.figure.update_xaxes(automargin=True)
    return plot
