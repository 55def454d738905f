"""The tokenizer of a GGUF file, from the vocabulary in it: byte pairs, SentencePiece, or RWKV's world.

What the file names and this module does not know costs the tokenizer, not the model: a warning says which, and the
model takes token ids.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from hooked_mamba.loading.gguf.keys import FILE, text_of
from hooked_mamba.loading.gguf.pre_tokenizers import PRE_TOKENIZERS
from hooked_mamba.loading.tables import CheckpointError
from hooked_mamba.loading.world_tokenizer import WorldTokenizer

__all__ = ["find_tokenizer"]

UNKNOWN, CONTROL, OWN, UNUSED, BYTE = 2, 3, 4, 5, 6
"""Kinds of tokens (`tokenizer.ggml.token_type`) that are not plain."""

SPECIAL = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad", "seperator": "sep"}
"""The file's word for a special token -> transformers' (llama.cpp spells the fifth like this)."""


def find_tokenizer(values: Mapping[str, Any]) -> Any:
    """The tokenizer, None where the file has none; a warning and None where it has one that is not known here."""
    kind = text_of(values, "tokenizer.ggml.model", "none")
    makers = {"gpt2": _byte_pairs, "llama": _sentence_pieces, "rwkv": _world}
    if kind in ("none", "no_vocab"):
        return None
    try:
        if kind not in makers:
            raise CheckpointError(f"its kind is {kind!r}; expected one of {', '.join(makers)}")
        return makers[kind](values)
    except (CheckpointError, ValueError) as error:
        warnings.warn(
            f"{values.get(FILE, 'this GGUF file')}: its tokenizer is not read, the model takes token ids or a"
            f" tokenizer= of yours: {error}",
            stacklevel=2,
        )
        return None


def _list(values: Mapping[str, Any], name: str, length: int | None = None) -> list[Any]:
    """An array of the vocabulary.

    Raises
    ------
    CheckpointError
        It is missing or of another length.
    """
    found = values.get(f"tokenizer.ggml.{name}")
    if not isinstance(found, list | np.ndarray) or (length is not None and len(found) != length):
        expected = "a list" if length is None else f"a list of {length:,} entries"
        got = "missing" if found is None else f"{len(found):,} entries" if hasattr(found, "__len__") else repr(found)
        raise CheckpointError(f"tokenizer.ggml.{name} is {got}; expected {expected}")
    return list(found)


def _tokens(values: Mapping[str, Any]) -> tuple[list[str], list[int]]:
    """(tokens by id, their kinds)."""
    tokens = _list(values, "tokens")
    if not all(isinstance(token, str) for token in tokens):
        raise CheckpointError("tokenizer.ggml.tokens has entries that are no text")
    kinds = "tokenizer.ggml.token_type" in values
    return tokens, [int(k) for k in _list(values, "token_type", len(tokens))] if kinds else [1] * len(tokens)


def _vocabulary(tokens: Iterable[str]) -> dict[str, int]:
    """Ids by token; of two equal ones the first."""
    found: dict[str, int] = {}
    for id, token in enumerate(tokens):
        found.setdefault(token, id)
    return found


def _byte_pairs(values: Mapping[str, Any]) -> Any:
    """Byte pairs (GPT-2's kind): words by a pattern, then merges in the order of the file."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    name = text_of(values, "tokenizer.ggml.pre", "gpt-2")
    words = PRE_TOKENIZERS.get(name or "")
    if words is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError(f"the pre-tokenizer tokenizer.ggml.pre={name!r} is not known here; known are {known}")
    tokens, kinds = _tokens(values)
    vocabulary = _vocabulary(tokens)
    merges = [_pair(merge, vocabulary) for merge in _list(values, "merges")]
    model = models.BPE(vocab=vocabulary, merges=merges, ignore_merges=words.whole)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in words.patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return _finished(tokenizer, values, tokens, kinds, add_bos=words.whole)


def _pair(merge: Any, vocabulary: Mapping[str, int]) -> tuple[str, str]:
    """The two tokens of a merge; one that holds a space itself is told by what is in the vocabulary."""
    text = str(merge)
    cuts = [i for i, letter in enumerate(text) if letter == " " and 0 < i < len(text) - 1]
    for i in cuts:
        first, second = text[:i], text[i + 1 :]
        if first in vocabulary and second in vocabulary and first + second in vocabulary:
            return first, second
    raise CheckpointError(f"the merge {text!r} of tokenizer.ggml.merges is not of two tokens that make a third")


def _sentence_pieces(values: Mapping[str, Any]) -> Any:
    """SentencePiece's byte pairs (Llama's kind): the pair whose token has the highest score is merged first; characters
    that are no token become bytes."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    tokens, kinds = _tokens(values)
    scores = [float(score) for score in _list(values, "scores", len(tokens))]
    vocabulary = _vocabulary(tokens)
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for token, id in vocabulary.items():
        if kinds[id] not in (1, OWN):
            continue
        for i in range(1, len(token)):
            first, second = vocabulary.get(token[:i]), vocabulary.get(token[i:])
            if first is not None and second is not None:
                ranked.append((-scores[id], first, second, (token[:i], token[i:])))
    ranked.sort(key=lambda row: row[:3])
    unknown = next((tokens[id] for id, kind in enumerate(kinds) if kind == UNKNOWN), None)
    model = models.BPE(
        vocab=vocabulary,
        merges=[row[3] for row in ranked],
        unk_token=unknown,
        fuse_unk=True,
        byte_fallback=BYTE in kinds,
    )
    tokenizer = Tokenizer(model)
    prefix = values.get("tokenizer.ggml.add_space_prefix", True)
    steps: list[Any] = [normalizers.Prepend("▁")] if prefix else []
    tokenizer.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return _finished(tokenizer, values, tokens, kinds, add_bos=True)


def _finished(
    tokenizer: Any, values: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int], add_bos: bool
) -> Any:
    """With special tokens, and the ones that are put in front and behind."""
    from tokenizers import AddedToken
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    added = [
        AddedToken(tokens[id], special=kind == CONTROL, normalized=False)
        for id, kind in enumerate(kinds)
        if kind in (CONTROL, OWN)
    ]
    tokenizer.add_tokens(added)
    special: dict[str, tuple[str, int]] = {}
    for theirs, word in SPECIAL.items():
        id = values.get(f"tokenizer.ggml.{theirs}_token_id")
        if isinstance(id, int) and 0 <= id < len(tokens):
            special[word] = (tokens[id], id)
    around = [
        special[word]
        for word, default in (("bos", add_bos), ("eos", False))
        if word in special and values.get(f"tokenizer.ggml.add_{word}_token", default)
    ]
    if around:
        bos = [f"{one[0]}:0" for one in around if one == special.get("bos")]
        eos = [f"{one[0]}:0" for one in around if one != special.get("bos")]
        tokenizer.post_processor = TemplateProcessing(
            single=[*bos, "$A:0", *eos], pair=[*bos, "$A:0", *eos, *bos, "$B:1", *eos], special_tokens=around
        )
    words = {f"{word}_token": token for word, (token, _) in special.items()}
    template = values.get("tokenizer.chat_template")
    more = {"chat_template": template} if isinstance(template, str) else {}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **words, **more)


ESCAPES = {"n": b"\n", "t": b"\t", "r": b"\r", "\\": b"\\", "'": b"'", '"': b'"'}


def _world(values: Mapping[str, Any]) -> WorldTokenizer:
    """RWKV's world: tokens are bytes, written with Python's escapes; id 0 ends a text."""
    tokens, kinds = _tokens(values)
    plain = [(id, _bytes(token)) for id, token in enumerate(tokens) if id and kinds[id] != UNUSED]
    return WorldTokenizer(plain)


def _bytes(text: str) -> bytes:
    found = re.sub(rb"\\(x[0-9a-f]{2}|.)", _unescaped, text.encode("utf-8"), flags=re.DOTALL)
    return found


def _unescaped(match: re.Match[bytes]) -> bytes:
    word = match[1].decode("latin-1")
    if word.startswith("x") and len(word) == 3:
        return bytes([int(word[1:], 16)])
    if word not in ESCAPES:
        raise CheckpointError(f"a token of the vocabulary has the escape \\{word}, which is none of Python's")
    return ESCAPES[word]
