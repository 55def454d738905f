"""Coders over HTTP: pushed, found, fetched, by a revision, and what goes wrong on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap

import huggingface_hub
import huggingface_hub.constants
import pytest
import torch

from saes import SAE, SparseCoder, hub
from saes.files import CoderFileError
from saes.find import HubError
from saes.registry import Entry, index_bytes
from tests.saes.coders import coder
from tests.saes.files.formats import recurrentlens, saelens, sparsify, weights
from tests.saes.hub_server import TOKEN, Hub, serving

REPO = "someone/coders"

pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # between the client and its httpx
    pytest.mark.skipif(
        int(huggingface_hub.__version__.split(".")[0]) < 1,
        reason="the client before 1.0 takes another hub's address from the environment at import only",
    ),
]


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub that the client talks to, with an empty cache."""
    with serving() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        quiet = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False}
        for name, value in quiet.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield running


def tree(server: Hub, branch: str = "main") -> dict[str, bytes]:
    return server.commits[REPO][server.branches[REPO][branch]]


def same(a: SparseCoder, b: SparseCoder) -> bool:
    return a.cfg == b.cfg and all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())


def test_pushed_and_loaded(server):
    one, two = coder("topk", dtype=torch.float32), coder("batchtopk", "skip", dtype=torch.float32)
    metrics = {"a/one": {"fvu": 0.1, "l0": 4.0}}
    url = hub.push({"a/one": one, "two": two}, REPO, metrics=metrics, token=TOKEN)
    assert url == f"{server.url}/{REPO}/commit/{server.branches[REPO]['main']}"
    assert sorted(tree(server)) == [
        ".gitattributes", "README.md", "a/one/cfg.json", "a/one/sae_weights.safetensors", "index.json", "two/cfg.json",
        "two/sae_weights.safetensors",
    ]  # fmt: skip
    assert len(server.commits[REPO]) == 2, "one push is one commit"
    assert same(hub.load(REPO, "a/one"), one)
    assert same(SparseCoder.from_pretrained(f"{REPO}/two"), two)
    assert type(SAE.from_pretrained(REPO, "a/one")) is SAE
    listed = {entry.name: entry for entry in hub.list_coders(REPO)}
    assert listed["a/one"] == Entry.of("a/one", one.cfg, metrics["a/one"])
    assert [entry.name for entry in hub.search("mambacoder", REPO)] == ["two"]
    assert [entry.name for entry in hub.search(source=REPO, architecture="topk", layer=1)] == ["a/one"]


def test_a_second_push_adds_and_replaces(server):
    first, second = coder("topk", dtype=torch.float32), coder("gated", dtype=torch.float32)
    hub.push({"one": first, "two": first}, REPO, token=TOKEN)
    old = server.branches[REPO]["main"]
    hub.push({"two": second, "three": second}, REPO, token=TOKEN)
    assert {e.name: e.architecture for e in hub.list_coders(REPO)} == {"one": "topk", "two": "gated", "three": "gated"}
    assert same(hub.load(REPO, "two"), second)
    assert same(hub.load(REPO, "two", revision=old), first)
    with pytest.raises(CoderFileError, match=r"no coder 'three'.*index.json lists one, two"):
        hub.load(REPO, "three", revision=old)


def test_branches(server):
    first, second = coder("topk", dtype=torch.float32), coder("gated", dtype=torch.float32)
    hub.push({"one": first}, REPO, token=TOKEN)
    hub.push({"one": second}, REPO, revision="next", token=TOKEN)
    assert same(hub.load(REPO), first)
    assert same(hub.load(REPO, revision="next"), second)
    with pytest.raises(HubError, match=r"fetching 'someone/coders' at 'nxt' failed.*RevisionNotFound"):
        hub.load(REPO, "one", revision="nxt")


def test_someone_elses_push_comes_between(server):
    hub.push({"one": coder("topk")}, REPO, token=TOKEN)
    theirs = Entry.of("theirs", coder("gated").cfg)
    listed = [*hub.list_coders(REPO), theirs]
    server.before_commit = lambda: server.commit(REPO, "main", {"index.json": index_bytes(listed)}) and None
    hub.push({"two": coder("gated")}, REPO, token=TOKEN)
    assert sorted(entry.name for entry in hub.list_coders(REPO)) == ["one", "theirs", "two"]


def test_without_the_right_to_write(server):
    with pytest.raises(HubError, match="pushing to 'someone/coders' failed"):
        hub.push(coder("topk"), REPO, token="hf_wrong")
    assert REPO not in server.commits


def test_a_private_repository(server):
    hub.push({"one": coder("topk")}, REPO, private=True, token=TOKEN)
    assert REPO in server.private
    with pytest.raises(HubError, match="fetching 'someone/coders' failed"):
        hub.load(REPO, "one")
    assert [entry.name for entry in hub.list_coders(REPO, token=TOKEN)] == ["one"]


def test_only_a_coders_files_are_fetched(server, tmp_path):
    hub.push({"one": coder("topk")}, REPO, token=TOKEN)
    server.commit(REPO, "main", {"one/evil.pt": b"x", "one/more.safetensors": b"x", "big.bin": b"x"})
    server.log.clear()
    hub.load(REPO, "one")
    fetched = {line.rpartition("/")[2] for line in server.log if "/resolve/" in line}
    assert fetched == {"cfg.json", "sae_weights.safetensors", "index.json"}


def test_one_that_is_fetched_needs_no_server_again(server, monkeypatch):
    made = coder("topk", dtype=torch.float32)
    hub.push({"one": made}, REPO, token=TOKEN)
    hub.load(REPO, "one")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(hub.load(REPO, "one"), made)


def test_which_one(server):
    hub.push({"one": coder("topk")}, REPO, token=TOKEN)
    assert hub.load(REPO).k == 4
    hub.push({"two": coder("topk")}, REPO, token=TOKEN)
    with pytest.raises(CoderFileError, match="has 2 coders; name one of one, two"):
        hub.load(REPO)
    with pytest.raises(CoderFileError, match=r"no coder 'tow'; nearest: 'two'; its index.json lists one, two"):
        hub.load(REPO, "tow")
    with pytest.raises(CoderFileError, match="leave subfolder='one' out"):
        SparseCoder.from_pretrained(f"{REPO}/one", "one")


@pytest.mark.parametrize(
    "name", ["../other", "one/../../x", "/etc", "", "a//b", "c:\\x", "one/", ".hidden", "a b", "x" * 300]
)
def test_names_that_lead_elsewhere(server, name):
    with pytest.raises(CoderFileError, match="is not a valid coder name"):
        hub.load(REPO, name)
    with pytest.raises(CoderFileError, match="is not a valid coder name"):
        hub.push({name: coder("topk")}, REPO, token=TOKEN)
    assert not server.log


def test_other_libraries_repositories(server, tmp_path):
    server.create(REPO)
    theirs = saelens(tmp_path / "x", weights("b_enc"), "standard")
    mixed = sparsify(tmp_path / "layers.2.mixer")
    files = {f"res/{p.name}": p.read_bytes() for p in theirs.iterdir()}
    server.commit(REPO, "main", files | {f"layers.2.mixer/{p.name}": p.read_bytes() for p in mixed.iterdir()})
    assert hub.load(REPO, "res").cfg.architecture == "standard"
    assert hub.load(REPO, "layers.2.mixer").cfg.in_site == "blocks.2.mixer.hook_out_proj"
    with pytest.raises(CoderFileError, match=r"no coder at its root and no index.json"):
        hub.load(REPO)
    with pytest.raises(CoderFileError, match=r"has no index.json; its coders load by the names"):
        hub.list_coders(REPO)
    server.commit(REPO, "main", {f"{p.name}": p.read_bytes() for p in theirs.iterdir()})
    assert hub.load(REPO).cfg.architecture == "standard"


def test_recurrentlens_names(server, tmp_path, monkeypatch):
    theirs = recurrentlens(tmp_path / "sae.safetensors", weights("b_enc"), "topk")
    server.create(REPO)
    server.commit(REPO, "main", {"sae.safetensors": theirs.read_bytes(), "l2.safetensors": theirs.read_bytes()})
    with pytest.raises(CoderFileError, match="does not save k; give k="):
        hub.load_sae(REPO)
    assert hub.load_sae(REPO, k=3).k == hub.load_sae(REPO, "l2.safetensors", k=3).k == 3
    torch.save(weights("b_enc", "threshold"), tmp_path / "jumprelu.pt")
    server.commit(REPO, "main", {"jumprelu.pt": (tmp_path / "jumprelu.pt").read_bytes()})
    archive = SparseCoder.from_pretrained(REPO, "jumprelu.pt", in_site="blocks.0.hook_resid_post")
    assert archive.cfg.architecture == "jumprelu"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.push_sae(coder("topk"), REPO)
    hub.push_sae(coder("topk"), REPO, "mine")
    assert [entry.name for entry in hub.list_coders(REPO)] == ["l1-resid_post-topk-40", "mine"]


INDICES = {
    "no JSON": (b"{", "is not valid JSON"),
    "a later format": (b'{"format": 9}', "is of format 9"),
    "no list": (b'{"format": 1, "coders": {}}', r"has coders=\{\}, expected a list"),
    "no object": (b'{"format": 1, "coders": ["x"]}', "lists 'x'; expected an object"),
    "an empty entry": (b'{"format": 1, "coders": [{}]}', "an entry of .* lacks name, kind"),
}


@pytest.mark.parametrize("case", INDICES)
def test_a_damaged_index(server, case):
    data, message = INDICES[case]
    server.create(REPO)
    server.commit(REPO, "main", {"index.json": data})
    with pytest.raises(CoderFileError, match=message):
        hub.list_coders(REPO)
    with pytest.raises(CoderFileError, match=message):
        hub.push({"one": coder("topk")}, REPO, token=TOKEN)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("name", "../../up", "is not a valid coder name"), ("name", 5, "name=5, expected str"),
    ("d_sae", "40", "d_sae='40', expected int"), ("k", True, "k=True, expected int | None"),
    ("metrics", {"fvu": "<script>"}, "metrics are numbers by name"), ("metrics", [], r"metrics=\[\], expected"),
])  # fmt: skip
def test_a_lying_index(server, field, value, message):
    made = json.loads(index_bytes([Entry.of("one", coder("topk").cfg)]))
    made["coders"][0][field] = value
    server.create(REPO)
    server.commit(REPO, "main", {"index.json": json.dumps(made).encode()})
    with pytest.raises(CoderFileError, match=message.replace("|", r"\|")):
        hub.list_coders(REPO)


def test_a_card_of_ones_own_is_kept(server):
    hub.push({"one": coder("topk", model_name="state-spaces/mamba-130m-hf")}, REPO, token=TOKEN)
    card = tree(server)["README.md"].decode()
    assert 'base_model:\n- "state-spaces/mamba-130m-hf"' in card
    server.commit(REPO, "main", {"README.md": b"# mine\n"})
    hub.push({"two": coder("topk")}, REPO, token=TOKEN)
    assert tree(server)["README.md"] == b"# mine\n"


def test_pulled(server, tmp_path):
    made = coder("jumprelu", "skip", dtype=torch.float32)
    hub.push({"one": made}, REPO, token=TOKEN, dtype="bfloat16")
    folder = hub.pull(REPO, tmp_path / "here", "one")
    assert same(SparseCoder.load(folder), hub.load(REPO, "one"))
    assert (folder / "cfg.json").read_bytes() == tree(server)["one/cfg.json"]
    assert not (folder / "cfg.json").is_symlink()


@pytest.mark.parametrize("dtype", ["float16", "float8_e4m3fn"])
def test_a_folder_is_pushed_as_it_is_stored(tmp_path, dtype):
    folder = coder("batchtopk", dtype=torch.float32).save(tmp_path / "one", dtype=dtype)
    hub.push({"two": folder}, tmp_path / "there")
    assert [(tmp_path / "there/two" / f).read_bytes() for f in ("sae_weights.safetensors", "cfg.json")] == [
        (folder / f).read_bytes() for f in ("sae_weights.safetensors", "cfg.json")
    ]


def test_no_server(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(HubError, match=r"fetching 'someone/coders' failed.*`hooked-mamba sae list` lists all"):
        SparseCoder.from_pretrained(REPO, "one")


@pytest.mark.slow
def test_by_the_environment_alone(tmp_path):
    """A fresh process that is told of the hub by HF_ENDPOINT and nothing else."""
    script = textwrap.dedent(
        f"""
        import torch
        from saes import hub
        from tests.saes.coders import coder

        made = coder("topk", dtype=torch.float32)
        hub.push({{"one": made}}, {REPO!r})
        back = hub.load({REPO!r}, "one")
        assert torch.equal(back.W_enc, made.W_enc)
        """
    )
    with serving() as running:
        told = {"HF_ENDPOINT": running.url, "HF_HOME": str(tmp_path), "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
        subprocess.run([sys.executable, "-c", script], env={**os.environ, **told}, check=True, timeout=300)
        assert "one/cfg.json" in tree(running)
