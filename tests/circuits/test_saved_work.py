"""Work on a graph's page: kept, shared and read back; in a real browser where there is one."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess

import pytest

from circuits import prune
from circuits.viewer import circuit_page, with_work
from circuits.viewer.page import node_id
from tests.circuits.test_graph import graph_of

CHECK = """
const told = {};
const several = inputs[target].slice(0, 3).map(([i]) => i), [first, second, third] = several;
several.forEach(togglePin);
rename(first, "a name </script>");
groupTogether([first, second], "both");
changed();
told.written = written();
told.cards = [...document.querySelectorAll(".card strong")].map((each) => each.textContent).sort();
told.between = between({ members: [first, second] }, { members: [target] });
told.sum = inputs[target].filter(([i]) => i === first || i === second).reduce((sum, [, weight]) => sum + weight, 0);
work.pins.clear(); work.groups = []; work.names.clear();
restore();
told.restored = written();
const other = structuredClone(told.written);
other.pins.push("feature/99/0/1");
told.unknown = readWork(other);
try { readWork({ format: "else" }); } catch (error) { told.refused = error.message; }
togglePin(first);
told.without = work.groups.map((group) => group.members.length);
const press = (i, key) => marks[i].dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
press(target, "ArrowDown");
told.focused = nodes[Number(document.activeElement.dataset.node)].layer;
press(second, "g"); press(third, "g");
document.dispatchEvent(new KeyboardEvent("keydown", { key: "G", bubbles: true }));
told.grouped = work.groups.map((group) => group.members.length);
by("search").value = nodes[third].label.slice(0, 8); find();
told.found = found.includes(third);
told.images = document.images.length;
told.picture = picture().slice(0, 4);
document.body.append(make("pre", { id: "told" }, JSON.stringify(told)));
"""


def _small():
    _, graph = graph_of(5, "local")
    return prune(graph).graph


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_work_is_kept_shared_and_read_back(tmp_path):
    graph = _small()
    html = circuit_page(graph).html
    script = re.findall(r"<script>(.*?)</script>", html, re.S)[0]
    checked = script + CHECK.replace("</script>", "<\\/script>")
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (script, checked)]
    page = tmp_path / "page.html"
    page.write_text(html.replace(digests[0], digests[1]).replace(script, checked), encoding="utf-8")
    flags = "--headless --no-sandbox --disable-gpu --no-first-run --virtual-time-budget=4000 --dump-dom"
    command = ["chromium", *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    out = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    found = re.search(r'<pre id="told">(.*?)</pre>', out, re.S)
    assert found, out[-2000:]
    told = json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))
    assert told["restored"] == told["written"]
    assert told["cards"] == sorted(["both", *(c for c in told["cards"] if c != "both")])
    assert len(told["cards"]) == 2
    assert told["between"] == pytest.approx(told["sum"])
    assert told["unknown"] == ["feature/99/0/1"]
    assert "hooked-mamba circuit work" in told["refused"]
    assert told["without"] == [1]
    assert told["focused"] < graph.nodes[0].layer
    assert told["grouped"] == [2]
    assert told["found"]
    assert (told["images"], told["picture"]) == (0, "<svg")
    path = tmp_path / "work.json"
    path.write_text(json.dumps(told["written"]), encoding="utf-8")
    named = with_work(graph, path)
    (members,) = named.supernodes.values()
    assert list(named.supernodes) == ["both"]
    assert [node_id(named.nodes[i]) for i in members] == told["written"]["groups"][0]["members"]
    assert named.nodes[members[0]].name == "a name </script>"


def test_saved_work_that_does_not_fit_is_refused(tmp_path):
    graph, path = _small(), tmp_path / "work.json"
    good = {"format": "hooked-mamba circuit work", "version": 1, "pins": [], "names": {}, "groups": []}
    own = node_id(graph.nodes[1])
    for found, said in (
        ("{", "not JSON"),
        ([], "not saved work"),
        (good | {"version": 2}, "version 2, expected 1"),
        (good | {"names": {own: 3}}, "names must map"),
        (good | {"groups": [{"name": "a", "members": [1]}]}, "names must map"),
        (good | {"names": {"feature/9/9/9": "x"}}, "'feature/9/9/9'"),
    ):
        path.write_text(found if isinstance(found, str) else json.dumps(found), encoding="utf-8")
        with pytest.raises(ValueError, match=re.escape(said)):
            with_work(graph, path)
    path.write_text(json.dumps(good | {"names": {own: "mine"}, "groups": [{"name": "", "members": [own]}]}))
    assert with_work(graph, path).supernodes == {"supernode 1": (1,)}
