"""A model with its dictionaries of one kind, and what they say at the last token of sentences."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from demos.dictionaries.bundle import WRITTEN
from demos.hunger.options import Options
from hooked_mamba import HookedModel, load_model
from hooked_mamba.model_hash import model_hash
from saes import SparseCoder
from saes.find import PRETRAINED
from saes.hub import list_coders
from saes.registry import Entry

KINDS = {"block": "MambaCoders of blocks", "write": "write dictionaries", "output": "SAEs of blocks' outputs"}
"""Kinds of dictionaries that the claims are judged for."""

REPORTS = {"block": "mambacoder", "write": "write", "output": "sae"}
"""Their names in `evaluation.json`."""


def kind_of(entry: Entry) -> str | None:
    """The kind of a coder by its sites; None: no kind that is studied."""
    if entry.kind == "mambacoder":
        return "block" if entry.target == "block" else None
    if entry.site.endswith(WRITTEN):
        return "write"
    return "output" if entry.site.endswith("mixer.hook_out_proj") else None


@dataclass(frozen=True)
class Subject:
    """What is studied."""

    name: str
    """The model's, and behind a slash the kind of dictionaries, where it is not MambaCoders."""
    model: HookedModel
    coders: dict[str, SparseCoder]
    """The dictionaries of all layers by name, lowest first."""
    saes: dict[str, SparseCoder]
    """With MambaCoders the model's SAEs, lowest first: what the story would be without MambaCoders."""
    metrics: dict[str, dict[str, Any]]
    """What was measured of them on held-out text when they were made."""
    options: Options
    kind: str = "block"
    together: dict[str, float] = field(default_factory=dict)
    """The same of all layers replaced at once."""

    @classmethod
    def load(cls, asked: str, options: Options) -> Subject:
        """A bundled model and dictionaries that were trained on it.

        Parameters
        ----------
        asked
            "NAME", "NAME/KIND" or "NAME/KIND=FOLDER": the kind is one of :data:`KINDS`, by default "block"; the folder,
            as `demos.dictionaries.bundle` writes it, by default the one that comes with the package.

        Raises
        ------
        ValueError
            There is no such kind, or no dictionary of it.
        """
        asked, _, given = asked.partition("=")
        name, _, kind = asked.partition("/")
        kind = kind or "block"
        if kind not in KINDS:
            raise ValueError(f"{asked}: expected one of the kinds {', '.join(KINDS)} behind the slash, got {kind!r}")
        folder = Path(given) if given else PRETRAINED / name
        found = list_coders(folder) if folder.is_dir() else []
        entries = [entry for entry in found if kind_of(entry) == kind]
        if not entries:
            where = given or "the package"
            raise ValueError(f"no MambaCoder of {name} comes with {where}" if kind == "block" else
                             f"none of {KINDS[kind]} of {name} is in {where}")  # fmt: skip
        model = load_model(name)
        model.requires_grad_(False)
        metrics = {entry.name.split("/")[-1]: dict(entry.metrics) for entry in entries}
        saes = [entry for entry in found if kind == "block" and entry.kind == "sae" and kind_of(entry) != "write"]
        report = folder / "evaluation.json"
        reports = json.loads(report.read_text(encoding="utf-8")) if report.is_file() else {}
        together = (reports.get(REPORTS[kind], {}).get("together") or {}).get("values", {})
        return cls(
            name if kind == "block" else f"{name}/{kind}",
            model,
            cls._coders(folder, entries),
            cls._coders(folder, saes),
            metrics,
            options,
            kind,
            together,
        )

    @property
    def model_name(self) -> str:
        """The model's alone."""
        return self.name.partition("/")[0]

    @property
    def first_layer(self) -> int:
        """The lowest layer in which a latent at the last token can know of a cue: what block 0 reads (a MambaCoder) and
        what it writes into memory is made of the last tokens alone, which all sentences share."""
        return 0 if self.kind == "output" else 1

    @staticmethod
    def _coders(folder: Path, entries: list[Entry]) -> dict[str, SparseCoder]:
        found = {}
        for entry in sorted(entries, key=lambda entry: (entry.layer, entry.name)):
            short = entry.name.split("/")[-1]
            found[short] = SparseCoder.load(folder / entry.name)
            found[short].requires_grad_(False)
        return found

    @torch.no_grad()
    def directions(self, coder: str, features: Sequence[int]) -> Float[Tensor, "n d"]:
        """Decoder rows as directions of the residual stream: of a write dictionary through the output's weights, as
        what is written reaches the stream, gates and scans aside."""
        found = self.coders[coder]
        rows = found.W_dec[list(features)]
        if self.kind != "write":
            return rows
        assert found.cfg.layer is not None  # sites of kinds lie in blocks
        place = found.cfg.out_site.split(".")[2]
        output = self.model.block(found.cfg.layer).branches[place].value_output()
        times = output.W.shape[1] // rows.shape[1]  # heads of queries that share one of values
        if times > 1:
            heads = rows.unflatten(1, (self.model.block(found.cfg.layer).branches[place].cfg.n_key_value_heads, -1))
            rows = heads.repeat_interleave(times, 1).flatten(1)
        return output.push(rows.to(output.W.dtype)).to(rows.dtype)

    def key(self) -> dict[str, Any]:
        """What results depend on besides code."""
        digest = hashlib.sha256()
        for name, coder in {**self.coders, **self.saes}.items():
            digest.update(name.encode())
            for value in coder.state_dict().values():
                digest.update(value.contiguous().numpy().tobytes())
        kind = {} if self.kind == "block" else {"kind": self.kind, "together": self.together}
        return {
            **kind,
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
    def of(cls, model: HookedModel, texts: Sequence[str]) -> Sentences:
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
    return Ends(log_p, {name: cache[coder.cfg.in_site].flatten(1) for name, coder in coders.items()})
