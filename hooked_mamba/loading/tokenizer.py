"""The tokenizer that goes with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def load_tokenizer(tokenizer: Any, folder: Path | None) -> Any:
    """A tokenizer object as it is; a local path or hub id loaded; with None the folder's own, where it has one."""
    if tokenizer is None:
        if folder is None or not any((folder / name).exists() for name in TOKENIZER_FILES):
            return None  # the model then takes token ids only, and says so when text comes
        tokenizer = folder
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    from transformers import AutoTokenizer  # slow to import, and token ids need none

    return AutoTokenizer.from_pretrained(str(tokenizer))
