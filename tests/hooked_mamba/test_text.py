"""Text in and out: the to_tokens family, losses of texts, with a tokenizer made here."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from hooked_mamba import load_model
from hooked_mamba.model.text import lm_cross_entropy_loss
from tests.hooked_mamba.tiny import build, relative
from tests.kinds import MIXERS

WORDS = ["<bos>", "<eos>", "<pad>", "<unk>", "the", "cat", "sat", "on", "a", "mat", "dog"]


def word_tokenizer(adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Whole words, one token each."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    special = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


@pytest.fixture(scope="module", params=MIXERS)
def model(request):
    model = build(request.param).double().requires_grad_(False)
    model.tokenizer = word_tokenizer()
    return model


def test_to_tokens(model):
    assert model.to_tokens("the cat").tolist() == [[4, 5]], "no BOS by default"
    assert model.to_tokens("the cat", prepend_bos=True).tolist() == [[0, 4, 5]]
    texts = ["the cat sat", "a"]
    assert model.to_tokens(texts).tolist() == [[4, 5, 6], [8, 2, 2]]
    assert model.to_tokens(texts, padding_side="left").tolist() == [[4, 5, 6], [2, 2, 8]]
    tokens, mask = model.to_tokens_and_mask(texts, padding_side="left", prepend_bos=True)
    assert tokens.tolist() == [[0, 4, 5, 6], [2, 2, 0, 8]]
    assert mask.tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_a_tokenizer_that_adds_a_bos_itself():
    model = build("mamba")
    model.tokenizer = word_tokenizer(adds_bos=True)
    assert model.to_tokens("the cat", prepend_bos=True).tolist() == [[0, 4, 5]], "one BOS, not two"
    assert model.to_tokens("the cat", prepend_bos=False).tolist() == [[4, 5]]
    assert model.to_single_token("cat") == 5
    assert model.get_token_position("cat", "the cat", prepend_bos=False) == 1


def test_to_string(model):
    assert model.to_string([4, 5]) == model.to_string(torch.tensor([4, 5])) == "the cat"
    assert model.to_string(torch.tensor([[4, 5], [8, 9]])) == ["the cat", "a mat"]
    assert model.to_string(5) == "cat"


def test_to_str_tokens(model):
    assert model.to_str_tokens("the cat") == ["the", "cat"]
    assert model.to_str_tokens("the cat", prepend_bos=True) == ["<bos>", "the", "cat"]
    assert model.to_str_tokens(["the cat", "a"]) == [["the", "cat"], ["a"]]
    assert model.to_str_tokens(torch.tensor([[4, 5]])) == model.to_str_tokens([4, 5]) == ["the", "cat"]


def test_single_tokens(model):
    assert model.to_single_token("cat") == 5
    assert model.to_single_str_token(5) == "cat"
    with pytest.raises(ValueError, match=r"'the cat' is not one token but 2.*the.*cat"):
        model.to_single_token("the cat")


def test_get_token_position(model, unchecked):
    text = "the cat sat on the mat"
    assert model.get_token_position("the", text) == 0
    assert model.get_token_position("the", text, mode="last") == 4
    assert model.get_token_position("the", text, prepend_bos=True) == 1
    assert model.get_token_position(6, model.to_tokens(text)) == 2
    with pytest.raises(ValueError, match="'dog' does not occur"):
        model.get_token_position("dog", text)
    with pytest.raises(ValueError, match="mode must be 'first' or 'last', got 'middle'"):
        model.get_token_position("the", text, mode="middle")


def test_residual_directions(model):
    assert torch.equal(model.tokens_to_residual_directions("cat"), model.W_U[:, 5])
    assert torch.equal(model.tokens_to_residual_directions(5), model.W_U[:, 5])
    assert torch.equal(model.tokens_to_residual_directions(torch.tensor([5])), model.W_U[:, 5])
    assert torch.equal(
        model.tokens_to_residual_directions(torch.tensor([[5, 6]])), model.W_U.t()[torch.tensor([[5, 6]])]
    )


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_list_of_texts_gives_each_what_it_gets_alone(model, side):
    texts = ["the cat sat on a mat", "a dog", "the"]
    logits, state = model(texts, padding_side=side, return_state=True)
    growing = {part for k in range(2) for branch in model.block(k).branches.values() for part in branch.growing}
    for i, text in enumerate(texts):
        n = len(text.split())
        alone, state_alone = model(text, return_state=True)
        mine = logits[i, -n:] if side == "left" else logits[i, :n]
        assert relative(mine, alone[0]) < 1e-12
        for layer, layer_alone in zip(state, state_alone, strict=True):
            for (name, part), (_, part_alone) in zip(layer.items(), layer_alone.items(), strict=True):
                if name.partition(".")[2] not in growing:  # keys of all columns, padding included
                    assert relative(part[i], part_alone[0]) < 1e-12, name


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_of_texts(model, side):
    texts = ["the cat sat on a mat", "a dog sat"]
    each = [model(text, return_type="loss", loss_per_token=True)[0] for text in texts]
    assert relative(model(texts, return_type="loss", padding_side=side), torch.cat(each).mean()) < 1e-12
    both = model(texts, return_type="both", padding_side=side)
    tokens, mask = model.to_tokens_and_mask(texts, padding_side=side)
    assert relative(lm_cross_entropy_loss(both.logits, tokens, mask), both.loss) < 1e-12
    assert relative(model(tokens, return_type="loss", attention_mask=mask.bool()), both.loss) < 1e-12


def test_texts_and_tokens_are_the_same_input(model):
    assert torch.equal(model("the cat"), model(torch.tensor([[4, 5]])))
    assert torch.equal(model("the cat", prepend_bos=True), model(torch.tensor([[0, 4, 5]])))
    _, cache = model.run_with_cache(["the cat", "a mat"])
    assert cache["hook_tokens"].tolist() == [[4, 5], [8, 9]]


def test_special_tokens_come_from_the_tokenizer_then_the_config():
    model = build("mamba", bos_token_id=7, eos_token_id=8, pad_token_id=9)
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (7, 8, 9)
    model.tokenizer = word_tokenizer()
    assert (model.bos_token_id, model.eos_token_id, model.pad_token_id) == (0, 1, 2)
    assert model.d_vocab_real == len(WORDS)


def test_set_tokenizer(model, tmp_path):
    other = build("mamba")
    with pytest.raises(ValueError, match="needs a tokenizer"):
        other.to_tokens("the cat")
    other.set_tokenizer(word_tokenizer(), default_padding_side="left")
    assert other.to_tokens(["the cat sat", "a"]).tolist() == [[4, 5, 6], [2, 2, 8]]
    assert other.to_tokens(["the cat sat", "a"], padding_side="right").tolist() == [[4, 5, 6], [8, 2, 2]]
    word_tokenizer().save_pretrained(tmp_path)
    other.set_tokenizer(tmp_path)
    assert other.to_tokens(["the cat sat", "a"]).tolist() == [[4, 5, 6], [8, 2, 2]]
    with pytest.raises(TypeError, match="tokenizer"):
        other.set_tokenizer(3)
    with pytest.raises(TypeError, match="tokenizer"):
        other.set_tokenizer(None)
    assert model.default_padding_side == "right"


def test_saved_tokenizers_are_of_a_class_that_all_versions_know(tmp_path):
    """transformers 5 writes a class of its own, which 4 does not have, and reads back either."""
    model = build("mamba")
    model.set_tokenizer(word_tokenizer())
    model.save_pretrained(tmp_path)
    about = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert about["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert not {"is_local", "local_files_only"} & set(about)
    assert load_model(tmp_path).to_tokens("the cat sat").tolist() == [[4, 5, 6]]
    about["tokenizer_class"] = "TokenizersBackend"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(about))
    assert load_model(tmp_path).to_tokens("the cat sat").tolist() == [[4, 5, 6]]


def test_pieces_of_sentencepiece_keep_their_spaces():
    words = ["<unk>", "</s>", "▁I", "▁like", "hungry", "▁hungry", "▁▁two", "▁"]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    model = build("mamba")
    model.tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", unk_token="<unk>")
    assert model.to_str_tokens("I like hungry") == [" I", " like", " hungry"]
    assert [model.to_single_str_token(i) for i in range(4, 8)] == ["hungry", " hungry", "  two", " "]


def test_generation_stops_at_any_of_several_ends():
    model = build("mamba", eos_token_id=[3, 5])
    assert model.cfg.eos_token_id == (3, 5)
    assert type(model.cfg).from_dict(json.loads(json.dumps(model.cfg.to_dict()))) == model.cfg
    assert (model.eos_token_id, model.eos_token_ids) == (3, (3, 5))
    for end in (3, 5):
        with model.hooks([("hook_logits", lambda x, hook, end=end: x * 0 + torch.eye(x.shape[-1])[end])]):
            made = model.generate(torch.tensor([[1, 2]]), 6, do_sample=False, verbose=False)
        assert made.tolist() == [[1, 2, end]]
    assert build("mamba", eos_token_id=[4]).cfg.eos_token_id == 4
    assert build("mamba", eos_token_id=[]).cfg.eos_token_id is None
    model.tokenizer = word_tokenizer()
    assert model.eos_token_ids == (1, 3, 5)


def test_padding_rows_without_a_tokenizer_are_never_drawn():
    model = build("mamba", d_vocab_unpadded=11)
    assert model.d_vocab_real == 11
    with model.hooks([("hook_logits", lambda x, hook: x + 50 * (torch.arange(x.shape[-1]) >= 11))]):
        made = model.generate(torch.tensor([[1, 2]]), 6, verbose=False)
    assert int(made.max()) < 11


def test_long_texts_come_without_a_warning(monkeypatch, caplog):
    """transformers warns of texts longer than a tokenizer's model_max_length, no limit of these models."""
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    model = build("mamba")
    model.tokenizer = word_tokenizer()
    model.tokenizer.model_max_length = 2
    model.tokenizer("the cat sat on")  # so it warns where it is asked directly
    assert "longer than the specified maximum" in caplog.text
    model.tokenizer.deprecation_warnings.clear()
    caplog.clear()
    for prepend_bos in (None, False):
        assert model.to_tokens("the cat sat on", prepend_bos=prepend_bos).shape == (1, 4)
    assert not caplog.records
