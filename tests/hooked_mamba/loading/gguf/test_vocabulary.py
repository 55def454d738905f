"""Tokenizers come out of the file as they went in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_mamba import load_model
from hooked_mamba.loading.gguf.header import read_header
from hooked_mamba.loading.gguf.pre_tokenizers import PRE_TOKENIZERS
from hooked_mamba.loading.gguf.vocabulary import find_tokenizer
from hooked_mamba.loading.world_tokenizer import WorldTokenizer
from tests.hooked_mamba.loading.gguf import vocabularies
from tests.hooked_mamba.loading.gguf.small import D, mamba_file

ENDINGS, SPACES = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)", r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PUBLISHED = {
    "olmo": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "qwen2": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + SPACES,
    "dbrx": ENDINGS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + SPACES,
}
"""As they stand in the tokenizer.json files of GPT-NeoX, Qwen2 and Llama 3."""

TEXTS = (vocabularies.TEXT, "unseen wörds 987 <own thing> it's\n\n  gone", " ", "", "a")


def _read(path: Path, keys: dict[str, Any]) -> Any:
    return find_tokenizer(read_header(mamba_file(path / "model.gguf", keys)).keys)


@pytest.mark.parametrize("pre", PUBLISHED)
def test_byte_pairs(pre: str, tmp_path: Path) -> None:
    source = vocabularies.byte_level(PUBLISHED[pre])
    found = _read(tmp_path, vocabularies.byte_level_keys(source, pre))
    for text in TEXTS:
        ids = source.encode(text).ids
        assert found(text)["input_ids"] == ids
        assert found.decode(ids) == text
    assert found.eos_token == "<|end|>"
    assert found("a<|end|>b")["input_ids"] == source.encode("a<|end|>b").ids


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_every_way_to_cut_keeps_all_bytes(pre: str, tmp_path: Path) -> None:
    source = vocabularies.byte_level(PUBLISHED["olmo"])
    found = _read(tmp_path, vocabularies.byte_level_keys(source, pre))
    for text in TEXTS:
        assert found.decode(found(text)["input_ids"]) == text


def test_sentence_pieces(tmp_path: Path) -> None:
    source = vocabularies.sentence_pieces()
    found = _read(tmp_path, vocabularies.sentence_piece_keys(source))
    for text in TEXTS:
        ids = source.encode(text).ids
        assert found(text, add_special_tokens=False)["input_ids"] == ids
        assert found(text)["input_ids"] == [1, *ids]  # llama.cpp's default for this kind
        assert found.decode(ids) == source.decode(ids, skip_special_tokens=False)  # of the source, bytes are special


def test_world(tmp_path: Path) -> None:
    tokens = [b"\x00", b"\n", b"'", b'"', b"\\", b"a", b"ab", "é".encode(), b"\xff", b" the"]
    tokens += [bytes([byte]) for byte in range(256) if bytes([byte]) not in tokens]
    keys = {
        "tokenizer.ggml.model": "rwkv",
        "tokenizer.ggml.tokens": ["<s>", *(repr(token)[2:-1] for token in tokens), "[PAD300]"],
        "tokenizer.ggml.token_type": [3, *[1] * len(tokens), 5],
    }
    found, source = _read(tmp_path, keys), WorldTokenizer(enumerate(tokens, 1))
    assert found.bytes_of == source.bytes_of
    assert found(vocabularies.TEXT) == source(vocabularies.TEXT)


def test_the_model_has_it(tmp_path: Path) -> None:
    source = vocabularies.byte_level(PUBLISHED["olmo"])
    keys = vocabularies.byte_level_keys(source, "olmo")
    rows = {"token_embd.weight": torch.randn(len(keys["tokenizer.ggml.tokens"]), D)}
    model = load_model(mamba_file(tmp_path / "model.gguf", keys, rows))
    assert model.to_tokens("The cat's mat")[0].tolist() == source.encode("The cat's mat").ids
    assert model.to_string(model.to_tokens("The cat's mat")[0]) == "The cat's mat"


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "unknown way to cut": (
        {"tokenizer.ggml.pre": "of-tomorrow"},
        r"tokenizer\.ggml\.pre='of-tomorrow' is not known here",
    ),
    "unknown kind": ({"tokenizer.ggml.model": "t5"}, "its kind is 't5'; expected one of gpt2, llama, rwkv"),
    "a list for a kind": ({"tokenizer.ggml.model": ["gpt2"]}, "its kind is '1 entries'; expected one of gpt2"),
    "numbers for a kind": ({"tokenizer.ggml.model": [1, 2]}, "its kind is '2 entries'; expected one of gpt2"),
    "a list for a way to cut": ({"tokenizer.ggml.pre": ["olmo"]}, r"tokenizer\.ggml\.pre='1 entries' is not known"),
    "no merges": ({"tokenizer.ggml.merges": None}, r"tokenizer\.ggml\.merges is missing; expected a list"),
    "merge of three": ({"tokenizer.ggml.merges": ["q zz x"]}, "the merge 'q zz x' .* is not of two tokens"),
    "kinds of other tokens": ({"tokenizer.ggml.token_type": [1, 1]}, r"token_type is 2 entries; expected a list of 42"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_not_known_costs_the_tokenizer_and_not_the_model(change: str, tmp_path: Path) -> None:
    changed, match = CHANGES[change]
    keys = vocabularies.byte_level_keys(vocabularies.byte_level(PUBLISHED["olmo"]), "olmo") | changed
    with pytest.warns(UserWarning, match=match) as caught:
        model = load_model(mamba_file(tmp_path / "model.gguf", keys))
    assert "model.gguf: its tokenizer is not read, the model takes token ids" in str(caught[0].message)
    assert model.tokenizer is None
    assert model([[1, 2, 3]]).shape == (1, 3, 40)
