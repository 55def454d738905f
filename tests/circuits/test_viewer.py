"""The circuit page and the command that writes it."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from circuits import load_graph, prune
from circuits.viewer import circuit_page
from hooked_mamba.cli.app import make_app
from tests.circuits.test_graph import graph_of

APP = make_app()
HOSTILE = "</script><img src=x onerror=alert(1)>&\u2028\"'"


def data_of(html: str) -> dict:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)[1])


def test_the_page_holds_the_graph():
    _, graph = graph_of(5, "local")
    graph = prune(graph).graph.with_supernode("group", [0, 1])
    data = data_of(circuit_page(graph, report="(a) fine").html)
    assert [node["label"] for node in data["nodes"]] == [node.label for node in graph.nodes]
    assert len(data["edges"]) == int((graph.weights != 0).sum())
    for source, target, weight in data["edges"][:20]:
        assert weight == pytest.approx(float(graph.weights[target, source]), rel=1e-3)
    assert len(data["paths"]) == 2
    assert data["supernodes"] == {"group": [0, 1]}


def test_the_page_says_what_its_edges_hold():
    for selection, words in (("none", "selection frozen at this prompt"), ("gradient", "nothing is frozen")):
        _, graph = graph_of(5, None)
        page = circuit_page(replace(graph, about={**graph.about, "selection": selection}))
        assert words in page.html


def test_the_panel_can_be_closed_on_a_narrow_screen():
    """Where it lies over the graph; on wide ones, where it stands beside it, there is no button and it is open."""
    _, graph = graph_of(5, "local")
    html = circuit_page(graph).html
    wide, narrow = re.search(r"<style>(.*?)</style>", html, re.S)[1].split("@media (max-width: 900px)")
    assert "#fold { display: none; }" in wide
    assert ".closed" not in wide
    assert "#panel.closed > :not(.head) { display: none; }" in narrow
    assert 'button.addEventListener("click", () => { closed = !closed; tell(); });' in html


def test_no_text_becomes_markup(tmp_path):
    _, graph = graph_of(5, "block")
    graph = replace(graph, tokens=(HOSTILE,) * len(graph.tokens)).renamed({2: HOSTILE}).with_supernode(HOSTILE, [1])
    page = circuit_page(graph, title=HOSTILE, report=HOSTILE)
    assert "<img" not in page.html
    assert data_of(page.html)["tokens"][0] == HOSTILE
    assert data_of(page.html)["nodes"][2]["name"] == HOSTILE
    # Nothing comes from elsewhere, and only the page's own script may run.
    assert not re.search(r"(src|href)=\"(?!data:)", page.html)
    assert "script-src 'sha256-" in page.html
    path = page.save(tmp_path / "deep" / "page.html")
    assert path.read_text(encoding="utf-8") == page.html


def test_what_is_known_of_features_is_shown():
    from saes.explorer.collect import collect

    frozen, graph = graph_of(5, "block")
    coder = frozen.coded[1].coder
    found = collect(frozen.model, coder, frozen.tokens.repeat(4, 1), progress=False)
    about = next(iter(found.values())) if isinstance(found, dict) else found
    data = data_of(circuit_page(graph, features={1: about}).html)
    for key, known in data["features"].items():
        node = data["nodes"][int(key)]
        assert (node["kind"], node["layer"]) == ("feature", 1)
        assert set(known) >= {"contexts"}
    assert data["features"]


def test_the_command(tmp_path):
    arguments = ["I like to eat", "--target", " toast", "--budget", "8", "--out", str(tmp_path / "c.html")]
    result = CliRunner().invoke(APP, ["circuit", *arguments, "--graph", str(tmp_path / "graph")])
    assert result.exit_code == 0, result.output
    assert "all other paths" in result.output
    assert "nodes recover" in result.output
    assert "' toast'" in (tmp_path / "c.html").read_text(encoding="utf-8")
    graph = load_graph(tmp_path / "graph")
    assert int(graph.where("head").sum()) <= 8


def test_the_commands_page_shows_what_features_mean(tmp_path):
    text = tmp_path / "stories.txt"
    text.write_text("Tom was hungry. He ate some toast.\n<|endoftext|>\nLily was so sad.\n<|endoftext|>\n")
    coders = ["--coder", "tinystories-4l/l2-mambacoder", "--coder", "tinystories-4l/l3-mambacoder"]
    arguments = ["I like to eat", "--target", " toast", "--budget", "12", "--no-check", *coders]
    for more, word in (([], " eat"), (["--text", str(text)], " hungry")):
        page = tmp_path / "c.html"
        result = CliRunner().invoke(APP, ["circuit", *arguments, *more, "--out", str(page)])
        assert result.exit_code == 0, result.output
        data = data_of(page.read_text(encoding="utf-8"))
        nodes = [i for i, node in enumerate(data["nodes"]) if node["kind"] == "feature"]
        assert nodes
        assert set(data["features"]) == {str(i) for i in nodes}
        words = {w for known in data["features"].values() for context in known["contexts"] for w, _ in context}
        assert word in words
        assert all(known["promoted"] for known in data["features"].values())


def test_coders_of_other_weights_are_named(tmp_path):
    coders = ["--coder", "tinystories-4l-real/l2-mambacoder"]
    arguments = ["I like to eat", "--budget", "4", "--no-check", *coders, "--out", str(tmp_path / "c.html")]
    result = CliRunner().invoke(APP, ["circuit", *arguments])
    assert result.exit_code == 0, result.output
    assert "note: l2-mambacoder was trained on other weights than those of tinystories-4l" in result.output
    page = (tmp_path / "c.html").read_text(encoding="utf-8")
    several = sum(node["kind"] == "target" for node in data_of(page)["nodes"]) - 1
    assert f" and {several} other targets</h1>" in page


def test_the_commands_errors_are_one_line(tmp_path):
    out = str(tmp_path / "c.html")
    for arguments, said in (
        (["a", "--minus", " b", "--out", out], "--minus needs --target"),
        (["a", "--target", " not one token at all", "--out", out], "token"),
        (["a", "--coder", "nothing-of-this-name", "--out", out], "nothing-of-this-name"),
        (["a", "--text", "nothing.txt", "--out", out], "nothing.txt"),
        (["a", "--choose", "best", "--out", out], "'integrated'"),
        (["a", "--out", str(tmp_path)], "is a folder; name the file to write in it"),
        (["a", "--coder", "tinystories-4l", "--no-check", "--out", out], "a branch can be read by one only"),
    ):
        result = CliRunner().invoke(APP, ["circuit", *arguments])
        assert result.exit_code == 2
        assert said in result.output
        assert "Traceback" not in result.output
    assert not (tmp_path / "c.html").exists()
