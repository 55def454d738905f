"""A tiny model, dictionaries on it and a text, for the explorer's tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_mamba.models import HookedModel
from saes import SparseCoder, mambacoder_config, sae_config
from tests.hooked_mamba.tiny import build

NASTY = ["</script><img src=x onerror=alert(1)>", "<!--<script>", "\u2028&lt;b&gt;\"'`${1}", " cat", "\n"]
"""Token texts that would break a careless page."""


class Tokenizer:
    """Seventeen tokens, the first ones hostile."""

    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 17

    def decode(self, ids: Any, **options: Any) -> str:
        return "".join(NASTY[i] if i < len(NASTY) else f" w{i}" for i in map(int, ids))

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(c) % 17 for c in text]}


def model(family: str = "mamba") -> HookedModel:
    made = build(family)
    made.tokenizer = Tokenizer()
    return made


def sae(F: int = 40, k: int = 4, d: int = 10) -> SparseCoder:
    return SparseCoder(sae_config("blocks.1.mixer.hook_out_proj", d, F, k=k), seed=0)


def mambacoder(F: int = 24) -> SparseCoder:
    made = SparseCoder(mambacoder_config(0, 10, F, architecture="jumprelu", k=None), seed=1)
    with torch.no_grad():
        made.threshold.fill_(1.1)
    return made


def text(rows: int = 9, length: int = 13, seed: int = 3) -> Tensor:
    return torch.randint(17, (rows, length), generator=torch.Generator().manual_seed(seed))
