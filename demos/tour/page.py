"""The tour as one HTML page that needs no network."""

from __future__ import annotations

import json
from pathlib import Path

import plotly.graph_objects as go
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

import hooked_mamba
from demos.tinystories.checkpoint import write_atomically
from demos.tour import charts
from demos.tour.measure import Tour

TEMPLATE = Path(__file__).with_name("page.html")


def write_page(tour: Tour, path: Path) -> None:
    """Render the page; an older one at `path` is replaced whole."""
    write_atomically(path, render(tour).encode())


def render(tour: Tour) -> str:
    """The page's text."""
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    figures = {
        "wiped": charts.wiped(tour),
        "state_norm": charts.state_norm(tour),
        "step_size": charts.step_size(tour),
        "silenced": charts.silenced(tour),
    }
    # Plotly itself goes in once, with the first figure; what it writes is escaped by plotly.
    plots = {name: Markup(plot_html(name, figure, not i)) for i, (name, figure) in enumerate(figures.items())}
    worst = float(tour.wiped.probability[tour.wiped_layer, tour.wiped_position])
    return template.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        tour=tour,
        plots=plots,
        worst=worst,
        prompt_literal=repr(tour.prompt),
        visible=lambda token: Markup(charts.visible(token)),
        themes=Markup(json.dumps(charts.THEMES)),
        version=hooked_mamba.__version__,
    )


def plot_html(name: str, figure: go.Figure, with_library: bool) -> str:
    """A figure as a piece of the page."""
    return figure.to_html(full_html=False, include_plotlyjs=with_library, config=charts.CONFIG, div_id=f"plot-{name}")
