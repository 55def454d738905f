"""Tokenizers trained here on a few lines, and what a GGUF file holds of them."""

from __future__ import annotations

import functools
import json
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

TEXT = """The cat's mat isn't where I'd put it; we've 3 of 1234567 left... DON'T ask!
  Indented\tlines,\n\n\nblank ones and 2024-05-17.   Spaces   between, naïve café, Ünïcödé, 漢字かな, Привет мир.
def f(x):\n    return x**2 + f(x-1)  # comment\nCamelCaseWords and SCREAMING, e-mail@example.org 🙂🙃 👨‍👩‍👧
a\u0301e\u0300 combining, 12 345 6789, !!! ??? ''' \"\"\" `` ~~ == <= >= $9.99 50% x_y_z\r\nwindows\r\n"""
LINES = TEXT.splitlines(keepends=True) * 3

KINDS = {"normal": 1, "unknown": 2, "control": 3, "own": 4, "unused": 5, "byte": 6}


@functools.cache
def byte_level(pattern: str) -> Tokenizer:
    """Byte pairs over words cut by one pattern."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.add_tokens([AddedToken("<own thing>", normalized=False)])
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """Llama's kind: spaces are letters, what is unknown becomes bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=first, limit_alphabet=60, show_progress=False, max_token_length=8
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _tokens(tokenizer: Tokenizer) -> list[str]:
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    return sorted(vocabulary, key=vocabulary.__getitem__)


def byte_level_keys(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """As the converter writes it."""
    tokens = _tokens(tokenizer)
    kinds = {"<|end|>": KINDS["control"], "<own thing>": KINDS["own"]}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [kinds.get(token, 1) for token in tokens],
        "tokenizer.ggml.merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": tokens.index("<|end|>"),
    }


def sentence_piece_keys(tokenizer: Tokenizer) -> dict[str, Any]:
    """As the converter writes it: SentencePiece's scores fall with the rank of the merge that makes a token."""
    tokens = _tokens(tokenizer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    made = ["".join(merge) if isinstance(merge, list) else merge.replace(" ", "") for merge in merges]
    rank = {token: i for i, token in reversed(list(enumerate(made)))}
    kinds = [KINDS["normal"]] * len(tokens)
    kinds[:259] = [KINDS["unknown"], *[KINDS["control"]] * 2, *[KINDS["byte"]] * 256]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(rank.get(token, len(rank) + i)) for i, token in enumerate(tokens)],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
