"""The tour as text."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from demos.tour.measure import Tour

WIDTH = 112
"""Columns where the output is no terminal."""


def make_console() -> Console:
    """A console as wide as the terminal, or wide enough for the tables in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)


def show(tour: Tour, page: Path, console: Console) -> None:
    """Print predictions, sites and interventions, and where the page is."""
    console.print(f"[bold]{escape(tour.model_name)}[/]  {escape(tour.summary)}")
    console.print(f"\n[bold]{escape(tour.prompt)}[/][green]{escape(tour.continuation)}[/]\n")
    console.print(predictions_table(tour))
    console.print(sites_table(tour))
    console.print(
        f"The sites around and inside block 0, of {tour.n_sites} in all. Any of them can be read or replaced.\n"
    )
    console.print(outcomes_table(tour))
    where = f"layer {tour.wiped_layer}'s state is wiped after {tour.tokens[tour.wiped_position]!r}"
    console.print(f"\nWhen {escape(where)}:\n{escape(tour.prompt)}[yellow]{escape(tour.wiped_continuation)}[/]\n")
    console.print(f"The page with the heat maps: [bold]{escape(str(page))}[/]", soft_wrap=True)


def predictions_table(tour: Tour) -> Table:
    """The likeliest next tokens."""
    table = Table(title="Likeliest next tokens", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("token")
    table.add_column("probability", justify="right")
    table.add_column("logit", justify="right")
    table.add_column("")
    for p in tour.predictions:
        bar = "█" * round(40 * p.probability)
        table.add_row(escape(repr(p.token)), f"{p.probability:.1%}", f"{p.logit:.2f}", f"[green]{bar}[/]")
    return table


def sites_table(tour: Tour) -> Table:
    """Sites with shapes."""
    table = Table(title="\nSites", title_justify="left", box=None, padding=(0, 2, 0, 0))
    for heading in ("site", "shape", "what it is"):
        table.add_column(heading, no_wrap=heading != "what it is")
    for site in tour.sites:
        table.add_row(escape(site.name), escape(str(list(site.shape))), escape(site.meaning))
    return table


def outcomes_table(tour: Tour) -> Table:
    """Interventions and what they do."""
    answer = repr(tour.predictions[0].token)
    table = Table(title="Edits by hooks", title_justify="left", box=None, padding=(0, 2, 0, 0))
    table.add_column("edit")
    table.add_column(escape(f"P({answer})"), justify="right")
    table.add_column("logit", justify="right")
    table.add_column("predicted now", justify="right")
    for o in tour.outcomes:
        now = f"{o.top.token!r} {o.top.probability:.1%}"
        table.add_row(escape(o.what), f"{o.probability:.1%}", f"{o.logit:.2f}", escape(now))
    return table
