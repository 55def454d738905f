"""The dictionaries that come with the package: they load, fit their model, and are as good as their cards say."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch

from demos.tinystories.grammar import tell_stories
from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from saes import SparseCoder, splice
from saes.find import PRETRAINED, bundled_names
from saes.hub import list_coders
from saes.store import Capture, DataConfig, capture_to_memory, rows_of
from saes.targets import all_streams, read
from saes.training import load_model

EXPECTED = {
    *(f"tinystories-4l/l{i}-{kind}" for i in range(4) for kind in ("out", "mambacoder")),
    *(f"tinystories-4l-real/l{i}-{kind}" for i in range(4) for kind in ("out", "mambacoder")),
    "tinystories-4l/l2-selection",
    *(f"tinystories-mamba2-4l/l2-{kind}" for kind in ("out", "mambacoder")),
}
WRITTEN = ("tinystories-4l-real", "tinystories-told-4l", "tinystories-told-mamba2-4l", "tinystories-told-hybrid-4l")
WRITES = {f"{model}/l{i}-write" for model in WRITTEN for i in range(4)}


@cache
def model(name: str) -> HookedModel:
    return load_model(name)


@cache
def activations(name: str) -> dict[str, torch.Tensor]:
    """Of a few stories told by another seed than the training's."""
    cfgs = [SparseCoder.from_pretrained(n).cfg for n in bundled_names() if n.startswith(f"{name}/")]
    rows = rows_of(list(tell_stories(20, 7)), model(name), DataConfig())
    return capture_to_memory(Capture(model(name), all_streams(cfgs)), rows, 1024)


def test_all_are_there_and_small() -> None:
    assert set(bundled_names()) == EXPECTED | WRITES
    sizes = {path: path.stat().st_size for path in PRETRAINED.rglob("*") if path.is_file()}
    writes = sum(size for path, size in sizes.items() if path.parent.name.endswith("-write"))
    assert writes < 16e6
    assert sum(sizes.values()) - writes < 23e6
    for folder in sorted(PRETRAINED.iterdir()):
        assert "## Training" in (folder / "README.md").read_text()


@torch.no_grad()
@pytest.mark.parametrize("name", sorted(EXPECTED | WRITES))
def test_each_is_what_its_card_says(name: str) -> None:
    folder, _, own = name.partition("/")
    coder = SparseCoder.from_pretrained(name)
    assert coder.cfg.model_hash == model_hash(model(folder))
    metrics = {entry.name: entry for entry in list_coders(PRETRAINED / folder)}[own].metrics
    x, y = read(coder.cfg, activations(folder))
    explained = 1 - (y - coder(x)).square().sum() / (y - y.mean(0)).square().sum()
    assert float(explained) > metrics["ev"] - 0.1, "other and simpler text, but the same model"
    active = (coder.encode(x) != 0).sum(1).float().mean()
    assert 0.5 < float(active) / metrics["l0"] < 2, "the threshold was set on other text"
    assert metrics["dead_share"] < (0.1 if name in WRITES else 0.05), (
        "of write dictionaries: in the held-out text alone"
    )
    assert metrics["l0"] < 32.5
    if coder.cfg.is_sae:
        assert metrics["ce_recovered_zero"] > (0.9 if "hybrid" in name else 0.95)


@pytest.mark.parametrize("name", WRITTEN)
def test_models_run_on_their_write_dictionaries(name: str) -> None:
    """All layers replaced at once, as the evaluation beside them says."""
    report = json.loads((PRETRAINED / name / "evaluation.json").read_text())["write"]
    found = report["together"]["values"]
    assert found["ce_spliced"] - found["ce_clean"] < 0.03
    assert found["kl"] < 0.08
    assert all(coder["values"]["l0"] <= 32 for coder in report["coders"])
    coders = {f"l{i}": SparseCoder.from_pretrained(f"{name}/l{i}-write") for i in range(4)}
    tokens = model(name).to_tokens(list(tell_stories(12, 7)))[:, :128]
    with torch.no_grad():
        clean = model(name)(tokens).log_softmax(-1)
        with splice(model(name), coders):
            there = model(name)(tokens).log_softmax(-1)
    assert float((clean.exp() * (clean - there)).sum(-1).mean()) < 0.2, "of other text than the evaluation's"
