"""A model with its dictionaries, and what they say at the last token of sentences."""

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
from saes.registry import Entry


@dataclass(frozen=True)
class Subject:
    """What is studied."""

    name: str
    model: HookedMamba
    coders: dict[str, SparseCoder]
    """The MambaCoders of all layers by name, lowest first."""
    saes: dict[str, SparseCoder]
    """Its SAEs, lowest first: what the story would be without MambaCoders."""
    metrics: dict[str, dict[str, Any]]
    """What was measured of them on held-out text when they were made."""
    options: Options

    @classmethod
    def load(cls, name: str, options: Options) -> Subject:
        """A bundled model and the bundled dictionaries that were trained on it.

        Raises
        ------
        ValueError
            There is no MambaCoder.
        """
        folder = PRETRAINED / name
        bundled = list_coders(folder) if folder.is_dir() else []
        entries = [entry for entry in bundled if entry.kind == "mambacoder" and entry.target == "block"]
        if not entries:
            raise ValueError(f"no MambaCoder of {name} comes with the package")
        model = HookedMamba.from_pretrained(name)
        model.requires_grad_(False)
        metrics = {entry.name.split("/")[-1]: dict(entry.metrics) for entry in entries}
        saes = [entry for entry in bundled if entry.kind == "sae"]
        return cls(name, model, cls._coders(name, entries), cls._coders(name, saes), metrics, options)

    @staticmethod
    def _coders(name: str, entries: list[Entry]) -> dict[str, SparseCoder]:
        found = {}
        for entry in sorted(entries, key=lambda entry: (entry.layer, entry.name)):
            short = entry.name.split("/")[-1]
            found[short] = SparseCoder.from_pretrained(name, short)
            found[short].requires_grad_(False)
        return found

    def key(self) -> dict[str, Any]:
        """What results depend on besides code."""
        digest = hashlib.sha256()
        for name, coder in {**self.coders, **self.saes}.items():
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
    """What each dictionary reads there."""

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
    coders = {**subject.coders, **subject.saes}
    sites = [coder.cfg.in_site for coder in coders.values()]
    logits, cache = model.run_with_cache(
        sentences.tokens, attention_mask=sentences.mask, names_filter=sites, pos_slice=-1
    )
    log_p = logits[:, -1, : model.d_vocab_real].log_softmax(-1)
    return Ends(log_p, {name: cache[coder.cfg.in_site] for name, coder in coders.items()})
