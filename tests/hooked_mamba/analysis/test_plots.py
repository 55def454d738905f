"""Figures hold the numbers that they show."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hooked_mamba.analysis import plots
from hooked_mamba.analysis.lens import lens_labels, logit_lens, read_lens
from tests.docs.requests import requests_of
from tests.hooked_mamba.analysis.models import run


def test_heat_map_shows_its_matrix():
    values = torch.tensor([[1.0, -3.0], [0.5, 2.0]])
    figure = plots.heatmap(values, x=["a\n", "a\n"], y=["one", "two"], title="t")
    assert np.allclose(figure.data[0].z, values.numpy())
    assert (figure.data[0].zmin, figure.data[0].zmax) == (-3, 3)
    assert list(figure.layout.xaxis.ticktext) == ["a⏎", "a⏎"]
    with pytest.raises(ValueError, match="takes a matrix"):
        plots.heatmap(values[0])


def test_labels_are_no_markup_and_rows_are_no_halves():
    evil = "<b>x</b> & y"
    safe = "&lt;b&gt;x&lt;/b&gt; &amp; y"
    figure = plots.heatmap(torch.eye(2), x=[evil, "b"])
    assert figure.layout.xaxis.ticktext[0] == safe
    assert figure.layout.yaxis.dtick == 1
    assert plots.heatmap(torch.zeros(100, 2)).layout.yaxis.dtick is None
    assert plots.coloured_tokens([evil], torch.ones(1)).data[0].text[0][0] == safe
    assert plots.bars([evil], torch.ones(1)).data[0].y[0] == safe
    assert plots.lines(torch.ones(1, 2), [evil], [evil, "b"]).data[0].name == safe


def test_hidden_attention_has_a_slider_over_layers_and_channels():
    _model, tokens, _, cache = run("mamba2")
    figure = plots.hidden_attention_figure(cache, channels=[0, 1], row=2)
    assert len(figure.data) == len(figure.layout.sliders[0].steps) == 6
    assert [trace.visible for trace in figure.data] == [True] + [False] * 5
    assert np.allclose(figure.data[5].z, cache.hidden_attention(1, 1)[2].numpy(), atol=1e-6)
    assert figure.layout.sliders[0].steps[5].label == "layer 1, head 1"
    assert len(figure.layout.xaxis.ticktext) == tokens.shape[1]


def test_tokens_are_coloured_by_their_values():
    figure = plots.coloured_tokens(["x", "y", "z"], torch.tensor([1.0, 2.0, 3.0]), per_line=2)
    assert figure.data[0].z[1][0] == 3
    assert figure.data[0].text[0][1] == "y"
    with pytest.raises(ValueError, match="2 tokens, but 3 values"):
        plots.coloured_tokens(["x", "y"], torch.ones(3))


def test_lens_bars_and_lines():
    model, _, logits, cache = run("mamba")
    figure = plots.lens_figure(read_lens(logit_lens(cache)), model, lens_labels(cache), row=1)
    assert figure.data[0].text[2][6] == str(int(logits[1, 6].argmax()))
    chart = plots.bars(["a", "b", "c"], torch.tensor([1.0, -5.0, 2.0]), top=2)
    assert list(chart.data[0].y) == ["b", "c"]
    curves = plots.lines(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), ["first", "second"])
    assert list(curves.data[1].y) == [3, 4]


def test_html_needs_no_network(tmp_path):
    path = plots.save_html(plots.heatmap(torch.eye(2)), tmp_path / "map.html")
    text = path.read_text()
    assert "<html>" in text
    assert requests_of(text) == []
