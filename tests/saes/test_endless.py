"""Sources without an end: what is read depends on `n_tokens` alone, never on whether a progress bar is shown."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from saes import evaluate, evaluate_activations
from saes.explorer import collect
from saes.options import OptionError
from saes.store import ActivationStore, DocumentRows, ListedDocuments, MemoryBlocks
from saes.store.blocks import ModelBlocks
from saes.store.capture import Capture
from saes.store.rows import EveryNth, MixedRows, endless
from tests.saes.explorer import explored

LENGTH = 7


class Endless:
    """Documents for ever; counts how many were asked for."""

    def __init__(self, most: int = 400) -> None:
        self.given, self.most = 0, most

    def __iter__(self):
        for i in count():
            self.given += 1
            assert self.given <= self.most, "reads on and on"
            yield [(i * k + k) % 17 for k in range(1, LENGTH + 1)]


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("n_tokens", [1, LENGTH, 40])
def test_the_explorer_reads_so_many_positions_with_and_without_a_bar(n_tokens, progress):
    source = Endless()
    options = {"n_tokens": n_tokens, "context_length": LENGTH, "top": 3, "sampled": 2, "progress": progress}
    found = collect(explored.model(), {"mine": explored.sae()}, source, **options)["mine"]
    assert found.n_tokens == n_tokens
    first = torch.tensor([row for row, _ in zip(Endless(), range(6), strict=False)])
    z = _latents(first).flatten(0, 1)[:n_tokens]
    assert found.counts.tolist() == (z > 0).sum(0).tolist()
    assert source.given <= 2 + -(-n_tokens // LENGTH), "more rows are read than the positions need"


def _latents(tokens):
    coder = explored.sae()
    _, cache = explored.model().run_with_cache(tokens, names_filter=[coder.cfg.in_site])
    return coder.encode(cache[coder.cfg.in_site])


def test_a_disabled_bar_changes_nothing_of_the_sample(monkeypatch):
    options = {"n_tokens": 60, "context_length": LENGTH, "top": 3, "sampled": 4}
    shown, hidden = (
        collect(explored.model(), {"mine": explored.sae()}, Endless(), progress=progress, **options)["mine"]
        for progress in (True, False)
    )
    monkeypatch.setenv("TQDM_DISABLE", "1")
    for other in (hidden, collect(explored.model(), {"mine": explored.sae()}, Endless(), **options)["mine"]):
        assert torch.equal(other.counts, shown.counts)
        for part in ("top", "sampled"):
            assert torch.equal(getattr(other, part).rows, getattr(shown, part).rows)
            assert torch.equal(getattr(other, part).positions, getattr(shown, part).positions)


@pytest.mark.parametrize("progress", [False, True])
def test_evaluation_reads_no_further_than_it_needs(progress):
    source = Endless()
    batches = (torch.tensor([row]) for row in source)
    report = evaluate(explored.model(), explored.sae(), batches, ["l0"], n_tokens=3 * LENGTH, progress=progress)
    assert report.tokens == 3 * LENGTH
    assert source.given == 3


def test_activations_at_hand_without_end():
    coder = explored.sae()
    made = 0

    def batches():
        nonlocal made
        while True:
            made += 1
            yield {coder.cfg.in_site: torch.randn(8, 10, generator=torch.Generator().manual_seed(made))}

    assert evaluate_activations(coder, batches(), n_tokens=20).tokens == 24
    assert made == 3


def test_what_is_known_to_have_no_end_is_refused_without_a_number():
    model, coder = explored.model(), explored.sae()
    rows = DocumentRows(ListedDocuments([[1, 2, 3], [4, 5, 6]]), 3)
    once = DocumentRows(ListedDocuments([[1, 2, 3], [4, 5, 6]]), 3, epochs=1)
    assert endless(rows)
    assert not endless(once)
    assert endless(EveryNth(rows, 0, 2))
    assert not endless(MixedRows([(rows, 1.0), (once, 1.0)]))
    assert endless(MixedRows([(rows, 1.0), (once, 0.0)]))
    assert not endless(iter([]))
    with pytest.raises(OptionError, match=r"never ends: give the number of positions to read, n_tokens="):
        collect(model, {"mine": coder}, rows, progress=False)
    assert collect(model, {"mine": coder}, rows, n_tokens=50, progress=False)["mine"].n_tokens == 50
    store = ActivationStore(ModelBlocks(Capture(model, [coder.cfg.in_site]), rows, tokens=6), 3)
    with pytest.raises(ValueError, match=r"never ends: give the number of positions to evaluate, n_tokens="):
        evaluate_activations(coder, store)
    assert evaluate_activations(coder, store, n_tokens=5).tokens == 6
    values = {coder.cfg.in_site: torch.randn(6, 10)}
    with pytest.raises(ValueError, match="never ends"):
        evaluate_activations(coder, ActivationStore(MemoryBlocks(values), 3))
    assert evaluate_activations(coder, ActivationStore(MemoryBlocks(values, epochs=1), 3)).tokens == 6
