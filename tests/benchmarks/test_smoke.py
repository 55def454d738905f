"""Every benchmark runs at tiny shapes, and what it would publish is true there; no time is asserted."""

from __future__ import annotations

import math

import pytest
import torch

from tests.benchmarks.__main__ import BENCHMARKS, main
from tests.benchmarks.report import Bound, Section, Table, number, timing_table, write_section
from tests.benchmarks.sizes import SMOKE
from tests.benchmarks.timing import Timing, race, ratio


@pytest.fixture(autouse=True)
def one_thread():
    """As benchmarks run by default; and threads that wait for each other are slow on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


LONG = ("analysis", "attention", "attribution", "cache", "graphs", "rwkv")
"""Seconds each, of which every part is tested by itself."""


@pytest.mark.filterwarnings("ignore")  # the peers' own warnings
@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in BENCHMARKS])
def test_runs_and_agrees_with_float64(name):
    if name == "loading":
        pytest.importorskip("gguf")
    section = BENCHMARKS[name](SMOKE)
    assert section.tables
    assert not section.bounds  # promised for other sizes
    for table in section.tables:
        assert len(table.rows) >= 1
        for row in table.rows:
            assert len(row) == len(table.columns)
            assert f"| {row[0]} |" in section.markdown()
            cells = dict(zip(table.columns, row, strict=True))
            assert float(cells.get("error") or cells.get("difference from ours") or 0) < 1e-5
            assert cells.get("the tokens we give", "yes") != "no"


def test_race_takes_turns_and_drops_the_first_round():
    order = []
    sizes = SMOKE.__class__(**{**vars(SMOKE), "rounds": (2, 2)})
    timings = race({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, sizes)
    assert order == ["a", "b", "a", "b", "b", "a"]
    assert len(timings["a"].cpu) == len(timings["b"].wall) == 2


def test_ratio_is_the_median_of_rounds():
    slow, fast = Timing(cpu=[2.0, 40.0, 6.0], wall=[1, 1, 1]), Timing(cpu=[1.0, 10.0, 2.0], wall=[4, 4, 4])
    assert ratio(slow, fast) == 3
    assert ratio(slow, fast, "wall") == 0.25


def test_table_puts_ratios_first():
    timings = {"peer": Timing([0.2], [0.3]), "ours": Timing([0.1], [0.1])}
    faster = timing_table("t", timings, "peer", extra={"error": {"ours": "1e-7"}})
    slower = timing_table("t", timings, "peer", cost=True)
    assert faster.rows == [["peer", "1.00", "200", "300", ""], ["ours", "2.00", "100", "100", "1e-7"]]
    assert slower.rows[1][1] == "0.500"


@pytest.mark.parametrize(
    ("value", "text"),
    [(1234.5, "1,234"), (12.345, "12.3"), (0.5, "0.500"), (0, "0"), (2.5e-7, "2.5e-07"), (math.inf, "inf")],
)
def test_number(value, text):
    assert number(value) == text


def test_bound_says_whether_it_is_kept():
    assert "NOT KEPT" in str(Bound("x", 2.6, 2.7, at_least=True))
    assert "NOT KEPT" in str(Bound("x", 1.3, 1.25, at_least=False))
    assert str(Bound("x", 2.8, 2.7, at_least=True)).endswith(": kept")


def test_write_section_replaces_only_its_own(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("head\n<!-- bench: a -->\nold\n<!-- end: a -->\n<!-- bench: b -->\nb\n<!-- end: b -->\n")
    section = Section("A", "new text", [Table("t", ["", "n"], [["row", "1"]])])
    write_section(page, "a", section.markdown())
    assert "old" not in page.read_text()
    assert "| row | 1 |" in page.read_text()
    assert page.read_text().endswith("<!-- bench: b -->\nb\n<!-- end: b -->\n")
    with pytest.raises(ValueError, match="bench: c"):
        write_section(page, "c", "")


def test_unknown_name_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["scam"])
    assert "scan, memory" in capsys.readouterr().err
