"""What a study found: paragraphs, tables and figures, on the screen and as one page that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import plotly.graph_objects as go
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from torch import Tensor

import hooked_mamba
from demos.tinystories.checkpoint import write_atomically
from demos.tour.charts import THEMES, heat_map, visible
from demos.tour.page import plot_html

TEMPLATE = Path(__file__).with_name("page.html")

Scale = Literal["sequential", "diverging"]


@dataclass(frozen=True)
class Table:
    """Text cells under headings. The first columns hold text, the others are set to the right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    texts: int = 1
    """How many columns hold text."""


@dataclass(frozen=True)
class Plot:
    """A figure, and which of the page's two colour scales it takes."""

    figure: go.Figure
    scale: Scale


@dataclass
class Section:
    """One step of a study."""

    heading: str
    text: str
    table: Table | None = None
    plots: list[Plot] = field(default_factory=list)
    after: str = ""
    """What to see in them."""


@dataclass
class Report:
    """A whole study."""

    name: str
    title: str
    lead: str
    source: str
    """The paper."""
    model: str
    sections: list[Section] = field(default_factory=list)


def layer_map(
    values: Tensor,
    words: Sequence[str],
    legend: str,
    form: str = "{:+.3f}",
    rows: Sequence[str] | None = None,
    diverging: bool = True,
) -> Plot:
    """Layers (or what `rows` says) down, tokens across.

    Parameters
    ----------
    values
        layer token.
    legend
        What the colour means, with its unit.
    form
        How a value is written when pointed at.
    """
    names = [html.escape(row) for row in rows] if rows is not None else [f"layer {i}" for i in range(len(values))]
    labels = [visible(word) for word in words]
    hover = [
        [f"{name}, <b>{label}</b><br>{form.format(value)}" for label, value in zip(labels, line, strict=True)]
        for name, line in zip(names, values.tolist(), strict=True)
    ]
    figure = heat_map(values.float(), labels, hover, legend, names, diverging)
    return Plot(figure, "diverging" if diverging else "sequential")


def show(report: Report, page: Path, console: Console) -> None:
    """Print what can be printed, and where the page is."""
    console.rule(escape(report.title), align="left")
    console.print(f"{escape(report.lead)}\n[dim]{escape(report.source)}  {escape(report.model)}[/]")
    for section in report.sections:
        console.print(f"\n[bold]{escape(section.heading)}[/]\n{escape(section.text)}")
        if section.table:
            table = RichTable(box=None, padding=(0, 2, 0, 0))
            for i, column in enumerate(section.table.columns):
                table.add_column(escape(column), justify="right" if i >= section.table.texts else "left")
            for row in section.table.rows:
                table.add_row(*map(escape, row))
            console.print(table)
        if section.after:
            console.print(escape(section.after))
    console.print(f"\nWith the heat maps: [bold]{escape(str(page))}[/]\n", soft_wrap=True)


def write(report: Report, page: Path) -> None:
    """Write the page; an older one is replaced whole."""
    write_atomically(page, render(report).encode())


def render(report: Report, template: Path = TEMPLATE, **more: Any) -> str:
    """The page's text.

    Parameters
    ----------
    template
        A page of its own, which may extend "page.html".
    more
        What else the template asks for.
    """
    folders = [template.parent, TEMPLATE.parent]
    environment = Environment(
        loader=FileSystemLoader(folders),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    count = 0
    plots: list[list[tuple[Markup, str]]] = []
    for section in report.sections:  # plotly itself goes in once, with the first figure
        plots.append([])
        for plot in section.plots:
            plots[-1].append((Markup(plot_html(str(count), plot.figure, not count)), plot.scale))
            count += 1
    return environment.get_template(template.name).render(
        report=report, plots=plots, themes=Markup(json.dumps(THEMES)), version=hooked_mamba.__version__, **more
    )
