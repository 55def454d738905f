"""A model with its MambaCoders, and what they say at the last token of sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demos.hunger.options import Options
from hooked_mamba import HookedMamba
from saes import SparseCoder
from saes.find import PRETRAINED
from saes.hub import list_coders
from saes.model_hash import model_hash


@dataclass(frozen=True)
class Subject:
    """What is studied."""

    name: str
    model: HookedMamba
    coders: dict[str, SparseCoder]
    """The MambaCoders of all layers by name, lowest first."""
    metrics: dict[str, dict[str, Any]]
    """What was measured of them on held-out text when they were made."""
    options: Options

    @classmethod
    def load(cls, name: str, options: Options) -> Subject:
        """A bundled model and the bundled MambaCoders that were trained on it.

        Raises
        ------
        ValueError
            There are none.
        """
        folder = PRETRAINED / name
        bundled = list_coders(folder) if folder.is_dir() else []
        entries = [entry for entry in bundled if entry.kind == "mambacoder" and entry.target == "block"]
        if not entries:
            raise ValueError(f"no MambaCoder of {name} comes with the package")
        model = HookedMamba.from_pretrained(name)
        model.requires_grad_(False)
        entries.sort(key=lambda entry: (entry.layer, entry.name))
        coders, metrics = {}, {}
        for entry in entries:
            short = entry.name.split("/")[-1]
            coders[short] = SparseCoder.from_pretrained(name, short)
            coders[short].requires_grad_(False)
            metrics[short] = dict(entry.metrics)
        return cls(name, model, coders, metrics, options)

    def key(self) -> dict[str, Any]:
        """What results depend on besides code."""
        digest = hashlib.sha256()
        for name, coder in self.coders.items():
            digest.update(name.encode())
            for value in coder.state_dict().values():
                digest.update(value.contiguous().numpy().tobytes())
        return {
            "model": model_hash(self.model),
            "coders": digest.hexdigest()[:16],
            "options": self.options.to_dict(),
        }

    def token(self, text: str) -> int:
        """The id of a text of one token."""
        return self.model.to_single_token(text)


@dataclass(frozen=True)
class Ends:
    """What a model computes at the last token of some sentences."""

    log_p: Float[Tensor, "b v"]
    """Log-probabilities of the next token, nats."""
    x: dict[str, Float[Tensor, "b d"]]
    """What each MambaCoder reads there."""

    def lead(self, word: int, against: int) -> Float[Tensor, " b"]:
        """One logit less another."""
        return self.log_p[:, word] - self.log_p[:, against]


@dataclass(frozen=True)
class Sentences:
    """Texts as tokens, padded on the left, so that all of them end in the last column."""

    tokens: Int[Tensor, "b l"]
    mask: Int[Tensor, "b l"]

    @classmethod
    def of(cls, model: HookedMamba, texts: Sequence[str]) -> Sentences:
        return cls(*model.to_tokens_and_mask(list(texts), padding_side="left"))

    def row(self, i: int) -> list[int]:
        """One sentence's ids without padding."""
        return self.tokens[i][self.mask[i].bool()].tolist()

    def columns(self, i: int, places: Sequence[int]) -> list[int]:
        """Places of one sentence as columns of the batch."""
        start = self.tokens.shape[1] - int(self.mask[i].sum())
        return [start + place for place in places]


@torch.no_grad()
def ends(subject: Subject, sentences: Sentences) -> Ends:
    """Run the model, hooks and contexts included, and keep the last column."""
    model = subject.model
    sites = [coder.cfg.in_site for coder in subject.coders.values()]
    logits, cache = model.run_with_cache(
        sentences.tokens, attention_mask=sentences.mask, names_filter=sites, pos_slice=-1
    )
    log_p = logits[:, -1, : model.d_vocab_real].log_softmax(-1)
    return Ends(log_p, {name: cache[coder.cfg.in_site] for name, coder in subject.coders.items()})
