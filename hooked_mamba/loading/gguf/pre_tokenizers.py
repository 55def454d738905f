r"""How a text is cut into words before byte pairs are merged, by the names that llama.cpp gives to published ways.

A file holds such a name only (`tokenizer.ggml.pre`); patterns are those of the models' own tokenizer.json, as far as
llama.cpp applies them: each pattern cuts what the one before left.
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["PRE_TOKENIZERS", "Words"]

_ENDINGS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(ending: str) -> str:
    """Words of lower case behind upper case, or of upper case alone."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return f"{start}{_UPPER}*{_LOWER}+{ending}|{start}{_UPPER}+{_LOWER}*{ending}"


_CASED_REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Words(NamedTuple):
    """One way to cut."""

    patterns: tuple[str, ...]
    whole: bool = False
    """Whether a word that is a token is taken as it is, whatever the merges say."""


_LLAMA3 = Words((rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_REST}",), whole=True)
_QWEN2 = Words((rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_REST}",))
_QWEN35 = Words(
    (
        rf"{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    )
)
_PLAIN = Words((_GPT2,))
_DIGITS = Words((r"\p{N}", _GPT2))
_FALCON = Words((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"))
_TEKKEN = Words((rf"{_cased('')}|\p{{N}}|{_CASED_REST}",), whole=True)
_GPT4O = Words((rf"{_cased(_ENDINGS + '?')}|\p{{N}}{{1,3}}|{_CASED_REST}",))

PRE_TOKENIZERS: dict[str, Words] = {
    **dict.fromkeys(("gpt-2", "mpt", "olmo", "jais", "phi-2", "roberta-bpe", "granite-docling"), _PLAIN),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "lfm2"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _LLAMA3._replace(whole=False)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    "qwen35": _QWEN35,
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell"), _DIGITS),
    "falcon": _FALCON,
    "tekken": _TEKKEN,
    "gpt-4o": _GPT4O,
}
"""`tokenizer.ggml.pre` -> how it cuts."""
