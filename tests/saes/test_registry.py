"""Folders of coders, names, searches, and what bundled names lead to: no network."""

from __future__ import annotations

import pytest
import torch

from saes import SparseCoder, find, hub, mambacoder_config, sae_config
from saes.files import CoderFileError, open_coder
from saes.naming import default_name, full_name, unique_name
from tests.saes.coders import coder
from tests.saes.files.formats import sparsify


def same(a: SparseCoder, b: SparseCoder) -> bool:
    return a.cfg == b.cfg and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_a_folder_does_just_as_well(tmp_path):
    one, two = coder("topk", dtype=torch.float32), coder("matryoshka", "mambacoder", dtype=torch.float32)
    place = tmp_path / "coders"
    assert hub.push({"one": one, "in/two": two}, place, metrics={"one": {"fvu": 0.5}}) == str(place)
    assert same(hub.load(place, "one"), one)
    assert same(SparseCoder.from_pretrained(str(place), "in/two"), two)
    assert same(SparseCoder.from_pretrained(place / "in" / "two"), two)
    assert [(e.name, e.metrics) for e in hub.list_coders(place)] == [("in/two", {}), ("one", {"fvu": 0.5})]
    hub.push(two, place)
    assert len(hub.list_coders(place)) == 3
    assert "| in/two |" in (place / "README.md").read_text()
    (place / "index.json").unlink()
    assert {e.name for e in hub.list_coders(place)} == {"one", "in/two", "l1-mambacoder-matryoshka-40"}


def test_coders_on_disk_keep_their_dtype_and_metrics(tmp_path):
    folder = coder("topk").save(tmp_path / "c", dtype="bfloat16", metrics={"fvu": 0.5, "l0": 3})
    hub.push({"one": folder, "two": str(sparsify(tmp_path / "layers.3"))}, tmp_path / "out", metrics={"one": {"l0": 4}})
    opened = open_coder(tmp_path / "out" / "one")
    assert opened.metrics == {"fvu": 0.5, "l0": 4}
    assert opened.weights()["W_enc"].dtype == torch.bfloat16
    assert hub.load(tmp_path / "out", "two").cfg.in_site == "blocks.3.hook_resid_post"


def test_names_made_from_configs():
    sae, local = sae_config("blocks.1.hook_resid_post", 8, 64), mambacoder_config(2, 8, 64, target="local")
    names = {
        "l1-resid_post": sae,
        "l10-h.4": sae_config("blocks.10.mixer.hook_h.4", 8, 64),
        "l1-norm.out": sae_config("blocks.1.norm.hook_out", 8, 64),
        "l1-mixer.norm.out": sae_config("blocks.1.mixer.norm.hook_out", 8, 64),
        "ln_final.out": sae_config("ln_final.hook_out", 8, 64),
        "embed": sae_config("hook_embed", 8, 64, architecture="gated"),
        "l2-mambacoder": mambacoder_config(2, 8, 64),
        "l2-mambacoder-local": local,
    }
    for name, cfg in names.items():
        assert default_name(cfg) == name
        assert full_name(cfg) == f"{name}-{cfg.architecture}-64"
    taken: list[str] = []
    for _ in range(4):
        taken.append(unique_name(local, taken))
    assert taken == [
        "l2-mambacoder-local",
        *(f"l2-mambacoder-local-batchtopk-64{end}" for end in ("", "-2", "-3")),
    ]


def test_what_cannot_be_pushed(tmp_path):
    one = coder("topk")
    for coders, message in [
        ([], "no coders to push"), ([one, one], "two of the coders would be called 'l1-resid_post-topk-40'"),
        ({"README.md": one}, "cannot be called 'README.md'"), ({"a": one, "a/b": one}, "cannot be called 'a'"),
    ]:  # fmt: skip
        with pytest.raises(CoderFileError, match=message):
            hub.push(coders, tmp_path / "x")
    with pytest.raises(CoderFileError, match="metrics of 'uno', which is not pushed; expected one, two"):
        hub.push({"one": one, "two": one}, tmp_path / "x", metrics={"uno": {"l0": 1}})
    with pytest.raises(CoderFileError, match="on this machine and has no revisions"):
        hub.push(one, tmp_path / "x", revision="main")
    assert not (tmp_path / "x").exists()


def test_searches(tmp_path):
    made = {
        "a": coder("topk", model_name="state-spaces/mamba-130m-hf"),
        "b": coder("topk", "mambacoder", F=24, model_name="tinystories-4l"),
        "c": SparseCoder(sae_config("blocks.3.mixer.hook_y", 12, 24, architecture="gated")),
    }
    hub.push(made, tmp_path)

    def names(*query, **fields):
        return "".join(entry.name for entry in hub.search(*query, source=tmp_path, **fields))

    assert names() == "abc"
    assert names("SAE topk") == "a"
    assert names("mamba-130m") == "a"
    assert names(model="TINY") == "b"
    assert names(d_sae=24) == "bc"
    assert names(site="*.hook_y") == "c"
    assert names(site="blocks.3.mixer.hook_y") == "c"
    assert names(kind="mambacoder", layer=1) == "b"
    with pytest.raises(ValueError, match="kind must be sae or mambacoder, got 'transcoder'"):
        names(kind="transcoder")
    assert names("nothing") == ""
    with pytest.raises(TypeError, match=r"not searched by 'archtecture', but by .*nearest: 'architecture'"):
        names(archtecture="topk")
    with pytest.raises(ValueError, match=r"architecture must be one of .*nearest: 'gated'"):
        names(architecture="gates")


@pytest.fixture
def bundled(tmp_path, monkeypatch):
    monkeypatch.setattr(find, "PRETRAINED", tmp_path / "pretrained")
    monkeypatch.setattr(hub, "PRETRAINED", tmp_path / "pretrained")
    made = coder("topk", dtype=torch.float32)
    made.save(tmp_path / "pretrained" / "tiny" / "mambacoder-1")
    made.save(tmp_path / "pretrained" / "tiny" / "l1-out")
    return made


def test_bundled_names(bundled, tmp_path, monkeypatch):
    assert find.bundled_names() == ["tiny/l1-out", "tiny/mambacoder-1"]
    assert same(SparseCoder.from_pretrained("tiny/l1-out"), bundled)
    assert same(SparseCoder.from_pretrained("tiny", "l1-out"), bundled)
    assert [entry.name for entry in hub.list_coders()] == ["tiny/l1-out", "tiny/mambacoder-1"]
    with pytest.raises(
        CoderFileError, match=r"mambacoder-2' is not a bundled.*of tiny there are tiny/l1-out, tiny/mamb"
    ):
        SparseCoder.from_pretrained("tiny/mambacoder-2")
    with pytest.raises(CoderFileError, match=r"comes with the package and has no revisions; .* got 'main'"):
        SparseCoder.from_pretrained("tiny/l1-out", revision="main")
    with pytest.raises(CoderFileError, match=r"'nowhere' is not a bundled coder, a folder or a hub id; of the b"):
        SparseCoder.from_pretrained("nowhere")
    monkeypatch.chdir(tmp_path)
    bundled.save("tiny/l1-out")
    assert find.resolve("tiny/l1-out").is_relative_to(tmp_path / "pretrained"), "bundled names come first"


def test_in_a_local_folder(tmp_path):
    made = coder("topk")
    hub.push({"one": made}, tmp_path)
    assert SparseCoder.from_pretrained(tmp_path).k == 4
    with pytest.raises(CoderFileError, match=r"has no 'won'; nearest: 'one'; it has one"):
        SparseCoder.from_pretrained(tmp_path, "won")
    with pytest.raises(CoderFileError, match="is not a valid coder name"):
        SparseCoder.from_pretrained(tmp_path / "one", "../one")
    with pytest.raises(CoderFileError, match="nowhere/at/all' does not exist: there is no folder nowhere"):
        hub.list_coders("./nowhere/at/all")
