"""The tour: its numbers against recomputations by other ways, and its page."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

from demos.tinystories.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer
from demos.tour.__main__ import main
from demos.tour.measure import SHOWN_LAYERS, continue_prompt, load, take_tour
from demos.tour.page import render
from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig
from hooked_mamba.state import LayerState, ModelState
from tests.kinds import MAMBA

PROMPT = "<b>a cat</b> & a"


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved model of each family, with a tokenizer."""
    folder = tmp_path_factory.mktemp("models")
    save_tokenizer(
        train_tokenizer(["One day a cat ate toast. The dog ate toast too."] * 4, 290),
        folder / "tokenizer",
        "test stories",
    )
    tokenizer = load_tokenizer(folder / "tokenizer")
    shape = {"d_model": 16, "n_layers": 3, "d_vocab": len(tokenizer) + 5}  # rows that stand for no token
    models = {
        "mamba": HookedMamba(MambaConfig(**shape, d_state=4), tokenizer, seed=0),
        "mamba2": HookedMamba2(Mamba2Config(**shape, d_state=8, head_dim=8), tokenizer, seed=0),
    }
    for name, model in models.items():
        with torch.no_grad():
            model.embed.weight.mul_(30)  # random weights predict next to nothing; larger ones make effects visible
        model.save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module", params=MAMBA)
def model(request, folders):
    return load(str(folders / request.param)).double()


@pytest.fixture(scope="module")
def tour(model):
    return take_tour(model, PROMPT, channels=3)


def log_probability(model, logits, tour):
    answer = model.to_single_token(tour.predictions[0].token)
    return logits[0, -1, : model.d_vocab_real].log_softmax(-1)[answer]


def test_predictions_are_those_of_a_plain_forward(model, tour):
    probabilities = model(PROMPT)[0, -1, : model.d_vocab_real].softmax(-1)
    assert [p.probability for p in tour.predictions] == pytest.approx(probabilities.topk(8).values.tolist())
    assert tour.predictions[0].token == model.to_single_str_token(int(probabilities.argmax()))


def test_wiping_the_last_layers_state_equals_reading_on_from_an_empty_one(model, tour):
    tokens, last = model.to_tokens(PROMPT), model.cfg.n_layers - 1
    for t in (0, 4, tokens.shape[1] - 2):
        _, state = model(tokens[:, : t + 1], return_state=True)
        layers = list(state)
        layers[last] = LayerState(layers[last].conv, torch.zeros_like(layers[last].ssm))
        logits = model(tokens[:, t + 1 :], initial_state=ModelState(tuple(layers)))
        expected = log_probability(model, logits, tour) - log_probability(model, model(tokens), tour)
        torch.testing.assert_close(tour.wiped.log_probability[last, t], expected)


def test_wiping_every_layer_after_the_last_token_leaves_what_the_skips_carry(model, tour):
    hooks = [("blocks.*.mixer.hook_h.-1", lambda h, hook: torch.zeros_like(h))]
    expected = log_probability(model, model.run_with_hooks(PROMPT, fwd_hooks=hooks), tour)
    torch.testing.assert_close(tour.wiped.probability[-1, -1].log(), expected)


def test_silencing_a_channel_equals_removing_its_row_of_out_proj(model, tour):
    before = log_probability(model, model(PROMPT), tour)
    for layer, rank in ((0, 0), (2, 1)):
        weight = model.blocks[layer].mixer.out_proj.weight
        kept = weight[:, tour.channels[layer, rank]].clone()
        with torch.no_grad():
            weight[:, tour.channels[layer, rank]] = 0
            expected = log_probability(model, model(PROMPT), tour) - before
            weight[:, tour.channels[layer, rank]] = kept
        torch.testing.assert_close(tour.silenced.log_probability[layer, rank], expected)


def test_direct_effects_are_the_slope_of_the_answers_lead_with_the_final_norm_held(model, tour):
    """In the last layer nothing but the final norm's divisor lies between a channel and the logits."""
    answer, last = model.to_single_token(tour.predictions[0].token), model.cfg.n_layers - 1
    _, cache = model.run_with_cache(PROMPT)
    stream = cache["out_proj", last][0, -1]
    channel = tour.channels[last, 0]
    value = cache["out", last, "mixer.norm"] if isinstance(model, HookedMamba2) else cache["y_gated", last]
    without = stream - value[0, -1, channel] * model.W_out[last, channel]

    def lead(out):
        normalized = (cache["resid_pre", last][0, -1] + out) / cache["scale"][0, -1]
        logits = (normalized * model.ln_final.weight) @ model.W_U[:, : model.d_vocab_real]
        return logits[answer] - logits.mean()

    torch.testing.assert_close(tour.direct[last, 0], lead(stream) - lead(without))


def test_state_norms_and_step_sizes(model, tour):
    _, cache = model.run_with_cache(PROMPT, names_filter=["blocks.1.mixer.hook_h.2", "blocks.1.mixer.hook_dt"])
    torch.testing.assert_close(tour.state_norm[1, 2], cache["h.2", 1].norm())
    torch.testing.assert_close(tour.dt[1], cache["dt", 1][0].mean(-1))


def test_the_continuation_starts_with_the_likeliest_token(model, tour):
    assert tour.continuation.startswith(tour.predictions[0].token)
    wiped = f"blocks.{tour.wiped_layer}.mixer.hook_h.{tour.wiped_position}"
    assert tour.wiped_continuation == continue_prompt(model, model.to_tokens(PROMPT), wiped)


def test_the_summary_starts_from_the_unchanged_model_and_names_every_kind(tour):
    first, *edits = tour.outcomes
    assert (first.probability, first.top) == (pytest.approx(tour.predictions[0].probability), tour.predictions[0])
    assert len(edits) == 2 * min(SHOWN_LAYERS, 3) + 2
    assert {edit.what.split()[0] for edit in edits} == {"wipe", "silence"}


class Tags(HTMLParser):
    """Elements that load something, and the text outside of scripts."""

    def __init__(self):
        super().__init__()
        self.addresses, self.text, self.stack, self.tags = [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag in ("script", "style"):
            self.stack.append(tag)

    def handle_endtag(self, tag):
        if self.stack and tag == self.stack[-1]:
            self.stack.pop()

    def handle_data(self, data):
        if not self.stack:
            self.text.append(data)


def test_the_page_is_one_file_that_loads_nothing_and_takes_no_text_for_markup(tour):
    page = Tags()
    page.feed(render(tour))
    assert page.addresses == ["data:,"]
    assert "b" not in page.tags  # the prompt's <b> is text
    text = re.sub(r"\s+", " ", "".join(page.text))
    assert PROMPT in text
    assert f"{100 * tour.predictions[0].probability:.1f}%" in text
    assert page.tags.count("svg") == 0  # drawn by the script, from these four
    assert render(tour).count('class="plotly-graph-div"') == 4


def test_the_command_prints_everything_and_says_where_the_page_is(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("CI", "true")
    out = tmp_path / "new" / "page.html"
    main(["--model", str(folders / "mamba"), "--prompt", PROMPT, "--out", str(out)])
    printed = capsys.readouterr().out
    for part in (PROMPT, "blocks.0.mixer.hook_h.-1", "[1, 32, 4]", "silence the 8 strongest", str(out)):
        assert part in printed
    assert [path.name for path in out.parent.iterdir()] == ["page.html"]  # nothing half-written beside it
    assert out.read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_wrong_model_name_is_one_clear_error(tmp_path):
    with pytest.raises(ValueError, match="absent' does not exist"):
        main(["--model", str(tmp_path / "absent"), "--out", str(tmp_path / "page.html")])
