"""What notebooks show of a model, a cache and results: the right facts, and every text escaped."""

from __future__ import annotations

from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig, utils
from hooked_mamba import analysis as an
from hooked_mamba.analysis.memory_probes import ReceptiveField, Saliency
from hooked_mamba.analysis.rank_one_edit import RankOneEdit
from hooked_mamba.display import Shown, table, value_html
from tests.kinds import MAMBA

EVIL = "<script>alert('x')</script>&amp;"
VOID = {"br", "hr", "img"}


class Checked(HTMLParser):
    """Texts and tags of a piece of HTML; that every tag is closed in order."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)


@pytest.fixture(params=MAMBA)
def model(request):
    if request.param == "mamba":
        return HookedMamba(MambaConfig(d_model=8, n_layers=2, d_vocab=20, d_state=4, model_name=EVIL), seed=0)
    cfg = Mamba2Config(d_model=8, n_layers=2, d_vocab=20, d_state=4, head_dim=4, n_groups=2, model_name=EVIL)
    return HookedMamba2(cfg, seed=0)


def test_a_model_shows_its_size_and_sites(model):
    page = Checked(model._repr_html_())
    assert page.tags <= {"table", "tr", "th", "td", "caption", "details", "summary"}
    text = " ".join(page.texts)
    assert f"{type(model).__name__}: {EVIL}" in text
    assert f"{sum(p.numel() for p in model.parameters()):,}" in text
    assert set(model.hook_dict) <= set(page.texts)
    assert {name for name, _ in model.named_parameters()} <= set(page.texts)
    assert ("heads" in text) == isinstance(model, HookedMamba2)


def test_a_cache_shows_names_that_may_be_anything(model):
    _, cache = model.run_with_cache(torch.tensor([[1, 2, 3]]))
    cache.cache_dict[EVIL] = torch.zeros(2, 3)
    page = Checked(cache._repr_html_())
    assert EVIL in page.texts
    assert "[2, 3]" in page.texts
    assert "blocks.1.mixer.hook_dt" in page.texts


def test_results_show_their_fields_and_escape_their_texts():
    found = an.DirectLogits(torch.tensor([1.0, -2.0]), [EVIL, "embed"])
    assert EVIL in Checked(found._repr_html_()).texts
    assert "-2.0000" in Checked(found._repr_html_()).texts
    word = utils.AnswerToken(EVIL, 3, 1.5, 0.25, [(EVIL, 2.0, 0.5)])
    page = Checked(word._repr_html_())
    assert EVIL in "".join(page.texts)
    assert "script" not in page.tags
    trace = an.CausalTrace(torch.tensor([[0.25, 0.5]]), 0.75, 0.125)
    texts = Checked(trace._repr_html_()).texts
    assert {"CausalTrace", "restored", "0.25", "0.5", "0.75", "0.125"} <= set(texts)


@pytest.mark.parametrize(
    "kind", [an.LensReading, RankOneEdit, Saliency, ReceptiveField, an.CausalTrace, utils.AnswerToken]
)
def test_every_result_of_the_analysis_is_shown(kind):
    assert issubclass(kind, Shown)


@pytest.mark.parametrize(
    "value",
    [torch.zeros(0), torch.zeros(3, 0), torch.tensor(2.0), torch.full((2, 2), torch.nan), torch.arange(4)]
    + [torch.zeros(100, 100), torch.zeros(2, 2, 2), torch.tensor([True]), torch.tensor([1.0, torch.inf])]
    + [None, 3, [1, 2.5, "a"], tuple(range(40)), {"a": EVIL}, torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)],
)
def test_any_value_is_shown(value):
    page = Checked(value_html(value))
    assert "".join(page.texts).strip()
    assert "script" not in page.tags


def test_a_large_tensor_is_not_written_out():
    assert "<td" not in value_html(torch.zeros(100, 100))
    assert value_html(torch.arange(6.0).reshape(2, 3)).count("<td") == 6


def test_table_escapes_everything():
    page = Checked(table([(EVIL, EVIL)], (EVIL, "b"), EVIL))
    assert page.texts.count(EVIL) == 4


def test_a_tied_and_an_untied_vocabulary_are_told_apart():
    cfg = MambaConfig(d_model=8, n_layers=1, d_vocab=20)
    assert "20, tied" in HookedMamba(cfg)._repr_html_()
    assert "20, tied" not in HookedMamba(replace(cfg, tie_embeddings=False))._repr_html_()
