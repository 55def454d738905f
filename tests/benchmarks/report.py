"""What a benchmark found: tables, bounds, remarks; on the screen and in Markdown."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from tests.benchmarks.timing import Timing, ratio


@dataclass
class Table:
    """Text cells under headings; the first column holds names."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Bound:
    """A figure that the project has promised, and what was measured."""

    what: str
    measured: float
    limit: float
    at_least: bool
    """Whether the figure may not be below the limit; otherwise it may not be above."""

    @property
    def kept(self) -> bool:
        """Whether the measured figure is within the limit."""
        return self.measured >= self.limit if self.at_least else self.measured <= self.limit

    def __str__(self) -> str:
        sign = "at least" if self.at_least else "at most"
        verdict = "kept" if self.kept else "NOT KEPT"
        return f"{self.what}: {number(self.measured)}, promised {sign} {self.limit:g}: {verdict}"


@dataclass
class Section:
    """All that one benchmark reports."""

    title: str
    text: str
    """What is compared, and how."""
    tables: list[Table] = field(default_factory=list)
    bounds: list[Bound] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The section below its heading."""
        parts = [self.text]
        for table in self.tables:
            head = ["| " + " | ".join(table.columns) + " |", "|---" + "|---:" * (len(table.columns) - 1) + "|"]
            parts.append(
                "\n".join([f"**{table.title}**", "", *head, *("| " + " | ".join(r) + " |" for r in table.rows)])
            )
        lines = [f"- {line}" for line in (*map(str, self.bounds), *self.remarks)]
        return "\n\n".join([*parts, "\n".join(lines)] if lines else parts)


def timing_table(
    title: str,
    timings: Mapping[str, Timing],
    reference: str,
    *,
    cost: bool = False,
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> Table:
    """Ratios first, then times, then further columns.

    Parameters
    ----------
    reference
        The row that the ratios compare with.
    cost
        Ratios are times the reference's time; otherwise times faster than it.
    extra
        Heading -> row -> text.
    """
    # One thread: processor time, which other processes do not lengthen. More: the clock, or sharing would not show.
    clock = "cpu" if torch.get_num_threads() == 1 else "wall"
    heading = f"times the time of {reference}" if cost else f"times faster than {reference}"
    rows = []
    for name, timing in timings.items():
        pair = (timing, timings[reference]) if cost else (timings[reference], timing)
        more = [cells.get(name, "") for cells in (extra or {}).values()]
        rows.append([name, number(ratio(*pair, clock)), number(timing.cpu_ms), number(timing.wall_ms), *more])
    return Table(title, ["", heading, "CPU ms", "clock ms", *(extra or {})], rows)


def number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, or all before the point."""
    if value is None:
        return "not measured"
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def relative_error(got: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference by the largest exact value."""
    return float((got.detach().double() - exact).abs().max() / exact.abs().max())


def write_section(page: Path, name: str, text: str) -> None:
    """Put text between `<!-- bench: NAME -->` and `<!-- end: NAME -->` of a page.

    Raises
    ------
    ValueError
        The page lacks the marks.
    """
    begin, end = f"<!-- bench: {name} -->", f"<!-- end: {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no {begin} ... {end} to write between")
    page.write_text(f"{before}{begin}\n{text}\n{end}{after}")


def show(section: Section, print_: Callable[[str], None] = print) -> None:
    """Print a section in columns."""
    print_(f"\n== {section.title} ==")
    for table in section.tables:
        print_(f"\n{table.title}")
        cells = [table.columns, *table.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(table.columns))]
        for row in cells:
            first, *others = (
                cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            print_("  ".join(["  " + first, *others]).rstrip())
    for line in (*map(str, section.bounds), *section.remarks):
        print_(f"- {line}")
