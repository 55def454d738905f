"""The latents of coders at every token of a text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.display import table
from hooked_mamba.model.text import PaddingSide
from hooked_mamba.models import HookedModel
from saes.naming import Coders, check_fits, named_coders, pick
from saes.sparse import Codes
from saes.store.rows import Rows
from saes.targets import last_layer, sites_of, stream_values


class Strongest(NamedTuple):
    """One place where a latent is strong."""

    feature: int
    value: float
    row: int
    position: int
    token: str | int
    """Its text, or its id where the model has no tokenizer."""


@dataclass(frozen=True, repr=False)
class Activations:
    """Latents of some coders at every token. Padding has none."""

    tokens: Int[Tensor, "b l"]
    real: Bool[Tensor, "b l"]
    """False at padding."""
    strings: tuple[tuple[str, ...], ...] | None
    """Each token's text; None without tokenizer."""
    codes: dict[str, Codes]
    """Coder -> its active latents, b l k."""
    widths: dict[str, int]
    """Coder -> its number of latents F."""

    def __repr__(self) -> str:
        counts = (f"{name} {int((codes.values != 0).sum()):,} active" for name, codes in self.codes.items())
        rows, real = len(self.tokens), int(self.real.sum())
        return f"Activations({rows} row{'s' * (rows != 1)}, {real} tokens; {', '.join(counts)})"

    def __getitem__(self, name: str) -> Float[Tensor, "b l F"]:
        return self.dense(name)

    def dense(self, name: str | None = None) -> Float[Tensor, "b l F"]:
        """All latents of a coder, active or not; `name` may be left out where there is one coder."""
        name = pick(self.codes, name)
        values, indices = self.codes[name]
        return values.new_zeros(*values.shape[:-1], self.widths[name]).scatter_add_(-1, indices, values)

    def feature(self, feature: int, name: str | None = None) -> Float[Tensor, "b l"]:
        """One latent at every token."""
        name = pick(self.codes, name)
        if not 0 <= feature < self.widths[name]:
            raise IndexError(f"feature {feature} is out of range: {name} has {self.widths[name]}")
        values, indices = self.codes[name]
        return torch.where(indices == feature, values, 0.0).sum(-1)

    def active(self, row: int, position: int, name: str | None = None) -> list[tuple[int, float]]:
        """The active latents of one token, the largest first; `position` as in :meth:`token`."""
        column = self.column(row, position)
        values, indices = (part[row, column] for part in self.codes[pick(self.codes, name)])
        pairs = [(i, v) for i, v in zip(indices.tolist(), values.tolist(), strict=True) if v != 0]
        return sorted(pairs, key=lambda pair: -pair[1])

    def top(self, k: int = 10, name: str | None = None) -> list[Strongest]:
        """The k latents with the largest values, each at its strongest token."""
        name = pick(self.codes, name)
        largest, where = self.dense(name).flatten(0, 1).max(0)
        best = largest.topk(min(k, len(largest)))
        length = self.tokens.shape[1]
        found = []
        for value, i in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            if value <= 0:
                break
            row, position = divmod(int(where[i]), length)
            found.append(Strongest(i, value, row, position, self.token(row, position)))
        return found

    def token(self, row: int, position: int) -> str | int:
        """A token's text, or its id where there is no tokenizer. Positions are columns; negative ones count from the
        row's last real token."""
        column = self.column(row, position)
        return self.strings[row][column] if self.strings is not None else int(self.tokens[row, column])

    def column(self, row: int, position: int) -> int:
        """The column of a position, negative ones from the row's last real token.

        Raises
        ------
        IndexError
            The row has no such position.
        """
        real = self.real[row].nonzero().flatten()
        length = self.real.shape[1]
        if position < 0:
            if -position > len(real):
                raise IndexError(f"position {position} is out of range: row {row} has {len(real)} tokens")
            return int(real[position])
        if position >= length:
            raise IndexError(f"position {position} is out of range: row {row} has {length} columns")
        return position

    def _repr_html_(self) -> str:
        shown = []
        for name in self.codes:
            rows = []
            for row, position in self.real.nonzero().tolist()[:200]:
                said = ", ".join(f"{i}: {value:.3g}" for i, value in self.active(row, position, name)[:6])
                rows.append((row, position, repr(self.token(row, position)), said))
            shown.append(table(rows, ("row", "position", "token", "strongest latents"), caption=name))
        return "".join(shown)


@torch.no_grad()
def encode_on(
    model: HookedModel,
    coders: Coders,
    input: str | Sequence[Any] | Tensor,
    *,
    prepend_bos: bool | None = None,
    padding_side: PaddingSide | None = None,
    attention_mask: Tensor | None = None,
) -> Activations:
    """Latents at every token of a text, from one pass that runs no further than the last coder's layer.

    Inside `with splice(...)` or `with steer(...)` they are those of the edited model.

    Parameters
    ----------
    coders
        One, several, or several by name.
    input
        Text, texts, or token ids, as the model takes them.
    prepend_bos, padding_side, attention_mask
        As in `forward`.

    Raises
    ------
    ValueError
        If a coder does not fit the model.
    """
    named = named_coders(coders)
    reads = {name: check_fits(coder, model, name)[0] for name, coder in named.items()}
    tokens, mask = model.input_to_tokens(input, prepend_bos, padding_side)
    if attention_mask is not None:
        mask = torch.as_tensor(attention_mask, device=tokens.device)
    sites = list(dict.fromkeys(site for stream in reads.values() for site in sites_of(stream, model)))
    last = last_layer(sites)
    _, cache = model.run_with_cache(
        tokens,
        names_filter=sites,
        attention_mask=mask,
        return_type=None,
        stop_at_layer=None if last is None else last + 1,
    )
    assert isinstance(cache, ActivationCache)
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool()
    codes, beginnings = {}, Rows(tokens, real).beginnings()
    for name, coder in named.items():
        x = stream_values(reads[name], cache, model, beginnings=beginnings)
        values, indices = coder.encode_topk(x)
        codes[name] = Codes(torch.where(real.unsqueeze(-1), values, 0.0), indices)
    strings = None
    if model.tokenizer is not None:
        strings = tuple(tuple(model._str_tokens(row, None)) for row in tokens)
    return Activations(tokens, real, strings, codes, {name: coder.cfg.d_sae for name, coder in named.items()})
