"""The notebooks: stored whole, in order and clean, and what they show is what they show when they run."""

from __future__ import annotations

import json
import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from demos.notebooks.__main__ import main
from demos.notebooks.execute import FIGURE, FOLDER, VARIES, differences, execute, notebooks, read, texts, write
from demos.notebooks.rounded import alike

LARGEST = 300_000
"""Bytes."""

OF_A_MACHINE = re.compile(
    r"/(work|home|root|tmp|Users|content|usr|opt|var)/|site-packages|[A-Z]:\\\\|[\d.]+ ?(it|tokens)/s"
)
"""Folders, and what progress bars say."""


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.fixture(params=notebooks())
def path(request):
    return notebooks()[request.param]


def test_all_are_there_and_in_the_table():
    listed = re.findall(r"^\| \[(\w+)\]\(\1\.ipynb\) \| \S", (FOLDER / "README.md").read_text(encoding="utf-8"), re.M)
    assert sorted(listed) == list(notebooks())
    assert set(listed) >= {"quickstart", "dictionary", "training", "circuit", "states", "moving"}


def test_the_first_cell_says_what_it_is_and_the_next_installs(path):
    text, install = read(path).cells[:2]
    assert text.cell_type == "markdown"
    assert text.source.startswith("# ")
    assert "installs the package" in text.source
    assert 'find_spec("hooked_mamba") is None' in install.source
    assert "%pip install" in install.source
    assert install.outputs == []


def test_it_was_run_from_the_top_and_nothing_failed(path):
    cells = code_of(read(path))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}


def test_it_is_small_and_names_no_machine(path):
    stored = path.read_text(encoding="utf-8")
    assert len(stored.encode()) < LARGEST
    assert OF_A_MACHINE.findall(stored) == []
    assert set(json.loads(stored)["metadata"]) == {"kernelspec", "language_info"}


def test_rich_outputs_have_words_for_those_who_see_text_alone(path):
    for cell in code_of(read(path)):
        for output in cell.outputs:
            if output.output_type != "stream" and set(output.data) != {"text/plain"}:
                assert re.fullmatch(r"\[.{4,90}\]", output.data["text/plain"], re.DOTALL)


def test_links_lead_somewhere(path):
    for cell in read(path).cells:
        for target in re.findall(r"\]\(([^)#:\s]+)\)", cell.source) if cell.cell_type == "markdown" else ():
            assert (FOLDER / target).exists(), f"{path.name} links to {target}"


SHOW_FIGURE = f"""
layout = {{"title": {{"text": "bars"}}, "template": {{"data": 1}}}}
display({{"{FIGURE}": {{"data": [], "layout": layout}}}}, raw=True)
"""

SHOW_TABLE = """
class Table:
    def __repr__(self):
        return "Table(rows=1)"

    def _repr_html_(self):
        return "<p>1</p>"


Table()
"""

WRITE_A_FILE = """
import pathlib

pathlib.Path("made").touch()
len(list(pathlib.Path().glob("made")))
"""


@pytest.fixture(scope="module")
def small():
    """Prints, shows a figure and a table, and writes a file."""
    codes = ["x = 1\nprint(x)\nprint(x + 1)", SHOW_FIGURE, SHOW_TABLE, WRITE_A_FILE]
    return new_notebook(cells=[new_markdown_cell("# Small"), *map(new_code_cell, codes)])


@pytest.fixture(scope="module")
def run(small):
    return execute(small)


def test_a_run_keeps_what_cells_show_and_the_notebook_given_stays_as_it_was(small, run):
    assert texts(run) == ["1\n2\n", f"{FIGURE} text/plain", "text/html text/plain", "1"]
    assert all(cell.outputs == [] for cell in code_of(small))


def test_a_run_is_tidied(run):
    nbformat.validate(run)
    assert run.metadata["language_info"] == {"name": "python"}
    figure, table = (cell.outputs[0].data for cell in code_of(run)[1:3])
    assert figure[FIGURE] == {"data": [], "layout": {"title": {"text": "bars"}}}
    assert (figure["text/plain"], table["text/plain"]) == ("[figure: bars]", "[Table]")
    assert "execution" not in code_of(run)[0].metadata


def test_other_output_is_a_difference_but_not_where_it_varies(run):
    assert differences(run, run) == []
    other = nbformat.from_dict(run)
    code_of(other)[0].outputs = [new_output("stream", name="stdout", text="1\n3\n")]
    (found,) = differences(run, other)
    assert "print(x + 1)\nshowed\n1\n2\n" in found
    varying = nbformat.from_dict(run)
    code_of(varying)[0].metadata["tags"] = [VARIES]
    assert differences(varying, other) == []


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("p = 0.12", "p = 0.13"),
        ("53% of 7", "54% of 7"),
        ("99.9%", "100.0%"),
        ("1.0e-06", "9.9e-07"),
        ("+0.0", "-0.0"),
        ("1,234.5", "1,234.6"),
    ],
)
def test_one_unit_of_the_last_digit_is_rounding(shown, printed):
    assert alike(shown, printed)
    assert alike(printed, shown)


@pytest.mark.parametrize(
    ("shown", "printed"),
    [
        ("p = 0.12", "p = 0.14"),
        ("53%", "55%"),
        ("7 nodes", "8 nodes"),
        ("1.2e-06", "1.2e-05"),
        ("True 0.1", "False 0.1"),
        ("a  0.1", "a 0.1"),
        ("0.1", "0.10"),
        ("+2.9e+00", "2.9"),
        ("0.1 0.2", "0.1"),
        ("[' so', ' I']", "[' I', ' so']"),
    ],
)
def test_anything_else_is_a_difference(shown, printed):
    assert not alike(shown, printed)
    assert not alike(printed, shown)


def test_notebooks_are_named_by_the_command(tmp_path, run):
    with pytest.raises(SystemExit, match=r"no notebook 'quick'; there are .*quickstart"):
        main(["quick"])
    write(tmp_path / "small.ipynb", run)
    assert [cell.id for cell in read(tmp_path / "small.ipynb").cells] == [f"cell-{i}" for i in range(5)]


@pytest.mark.slow
def test_a_new_run_shows_what_is_stored(path):
    stored = read(path)
    assert differences(stored, execute(stored)) == []
