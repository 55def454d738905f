"""A branch whose output, or the value that it writes into memory, is read as features and an error, by a coder.

block   o = sum_j z_j d_j + b_dec + skip + error
split   o = sum_j z_j d_j + b_dec + skip + error + (what the frozen mixer moves between positions) + its biases,
        the coder trained on the local part, so that nothing is counted twice
write   u = sum_j z_j d_j + b_dec + skip + error, and o = W_o (gain * scan(u)): what a feature writes at one position is
        carried to all later ones by the frozen scan (or pattern)

The features stand at a node of the branch, "out" or "u": what is above it reads them, and paths end there.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from circuits.read_values import pull_window, push_window, read_by
from hooked_mamba.components import at_least_fp32
from hooked_mamba.frozen.linear import Rows
from hooked_mamba.frozen.places import Part, Place, in_order, out_site, part_of, u_site
from hooked_mamba.frozen.run import Run
from hooked_mamba.hooks.names import unalias
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.renamed import warn_renamed
from saes.coder import SparseCoder
from saes.sparse import Codes

LayerMode = Literal["mixer", "block", "split", "write"]

TRAINED = {
    "block": "on a branch's output",
    "split": "on target 'local'",
    "write": "on the value that enters a mixer's memory",
}

AT_ONCE = 2**24
"""Numbers of decoder rows that are looked up together."""


@dataclass(frozen=True)
class CodedLayer:
    """One branch's coder at one run."""

    coder: SparseCoder
    part: Part
    mode: LayerMode
    codes: Codes
    """Active latents, b l k."""
    error: Float[Tensor, "b l f"]
    """What the coder misses, at the site that it predicts."""

    @classmethod
    def of_all(
        cls, run: Run, coders: Iterable[SparseCoder], mode: LayerMode | Mapping[Part, LayerMode] | None
    ) -> dict[Part, CodedLayer]:
        """Part -> its coder; those in mode "mixer" are left out.

        Raises
        ------
        ValueError
            Two coders for one branch, a coder that predicts neither a branch's output nor the value that enters its
            memory, or a mode that it was not trained for.
        """
        by_part: dict[Part, tuple[SparseCoder, Place]] = {}
        for coder in coders:
            place = _predicted(coder, run)
            if place.layer in by_part:
                first = by_part[place.layer][0].cfg
                raise ValueError(
                    f"two coders for {_named(place.layer)}, of {first.out_site} ({first.kind}) and"
                    f" {coder.cfg.out_site} ({coder.cfg.kind}): a branch can be read by one only, so choose one"
                )
            by_part[place.layer] = coder, place
        asked_for = {part: _mode(asked) for part, asked in mode.items()} if isinstance(mode, Mapping) else {}
        everywhere = None if isinstance(mode, Mapping) else _mode(mode)
        mixers = [i for i in range(run.n_layers) if "mixer" in run.model.block(i).branches]
        found: dict[Part, CodedLayer] = {}
        for part in sorted({*by_part, *mixers, *asked_for}, key=in_order):
            asked = asked_for.get(part, everywhere)
            if part not in by_part:
                if asked in TRAINED:
                    raise ValueError(f"mode {asked!r} needs a coder for {_named(part)}")
                continue
            coder, place = by_part[part]
            natural: LayerMode = "write" if place.stream == "u" else "block"
            natural = "split" if coder.cfg.target == "local" else natural
            if asked == "mixer":
                continue
            if asked not in (None, natural):
                raise ValueError(
                    f"{_named(part)}: mode {asked!r} needs a coder trained {TRAINED.get(str(asked), 'for it')}, this"
                    f" one's mode is {natural!r}"
                )
            found[part] = cls._at(run, coder, part, natural)
        return found

    @classmethod
    @torch.no_grad()
    def _at(cls, run: Run, coder: SparseCoder, part: Part, mode: LayerMode) -> CodedLayer:
        x = read_by(coder.cfg, run)
        codes = coder.encode_topk(x)
        said = coder.decode_sparse(codes, x).to(run.dtype)
        if mode == "split":
            chain, rows = run.chain(part), run.rows_of(1)
            p, _ = chain.push(run.entering(part), rows, until="p")
            true = chain.push_own(p, rows)
        else:
            true = at_least_fp32(run.value_at(coder.cfg.out_site))
        codes = Codes(codes.values.to(run.dtype), codes.indices)
        return cls(coder, part, mode, codes, true - said)

    def upto(self, stop: int) -> CodedLayer:
        """The same at the first positions alone."""
        codes = Codes(self.codes.values[:, :stop], self.codes.indices[:, :stop])
        return replace(self, codes=codes, error=self.error[:, :stop])

    @property
    def node(self) -> Literal["out", "u"]:
        """Where in the branch the features stand: its output, or the value that enters its memory."""
        return "u" if self.mode == "write" else "out"

    @property
    def W_dec(self) -> Float[Tensor, "F f"]:
        """Decoder rows."""
        return self.coder.W_dec.detach()

    def feature_effects(self, V: Float[Tensor, "n l f"], rows: Rows) -> Float[Tensor, "n l k"]:
        """z_j V . d_j of the active latents, for covectors on the site that is predicted."""
        if not isinstance(rows, Tensor):
            values, indices = self.codes.values[rows], self.codes.indices[rows]
            return torch.einsum("npf,npkf->npk", V, self.W_dec[indices].to(V.dtype)) * values
        effects = V.new_zeros(*V.shape[:2], self.codes.values.shape[-1])
        step = max(1, AT_ONCE // max(1, self.codes.values.shape[-1] * self.W_dec.shape[-1]))
        for row in rows.unique().tolist():
            mine = (rows == row).nonzero()[:, 0]
            for start in range(0, V.shape[1], step):
                at = slice(start, start + step)
                d = self.W_dec[self.codes.indices[row, at]].to(V.dtype)  # each position's rows once for all covectors
                effects[mine, at] = torch.einsum("npf,pkf->npk", V[mine, at], d) * self.codes.values[row, at]
        return effects

    def bias_effect(self, V: Float[Tensor, "n l f"]) -> Float[Tensor, " n"]:
        """V . b_dec, summed over positions."""
        return (V @ self.coder.b_dec.detach().to(V.dtype)).sum(1)

    def error_effects(self, V: Float[Tensor, "n l f"], rows: Rows) -> Float[Tensor, "n l"]:
        """V . error at each position."""
        return (V * self.error[rows]).sum(-1)

    def push_skip(self, run: Run, delta: Float[Tensor, "n l d"], rows: Tensor) -> Tensor | float:
        """What the skip makes of a change of the stream that the branch's norm reads."""
        if self.coder.W_skip is None:
            return 0.0
        place = run.place_of(self.coder.cfg.in_site)
        read = run.norm_of(self.part, place.weighted).of(rows).push(delta) if place.normed else delta
        return push_window(self.coder.cfg, run, read, rows) @ self.coder.W_skip.detach().to(delta.dtype)

    def pull_skip(self, run: Run, V: Float[Tensor, "n l f"], rows: Rows) -> tuple[Tensor, Tensor] | None:
        """What a skip adds to V below, and what the own bias of the norm that it reads adds; None without one."""
        if self.coder.W_skip is None:
            return None
        below = V @ self.coder.W_skip.detach().to(V.dtype).t()
        if self.coder.cfg.window > 1:
            assert isinstance(rows, Tensor)  # at a few points there is no skip from others
            below = pull_window(self.coder.cfg, run, below, rows)
        place = run.place_of(self.coder.cfg.in_site)
        bias = V.new_zeros(len(V)) + run.norm_offset(place, below.sum(1))
        if place.normed:
            below = run.behind_norm_of(self.part, below, rows, weighted=place.weighted)
        return below, bias


def _mode(asked: str | None) -> str | None:
    if asked == "hybrid":
        warn_renamed("mode 'hybrid'", "mode 'split'", stacklevel=5)
        return "split"
    return asked


def _named(part: Part) -> str:
    return f"layer {part}" if isinstance(part, int) else f"branch {part}"


def _predicted(coder: SparseCoder, run: Run) -> Place:
    """The branch whose output, or whose write, a coder predicts."""
    site = unalias(coder.cfg.out_site)
    layer = SiteName.parse(site).layer
    if layer is not None and not 0 <= layer < run.n_layers:
        raise ValueError(f"a coder for layer {layer}, but the model has {run.n_layers} layers")
    try:
        place = None if layer is None else run.place_of(site)
    except ValueError:
        place = None
    if layer is None or place is None or place.stream not in ("out", "u"):
        raise ValueError(
            f"a coder that predicts {coder.cfg.out_site} replaces no layer: expected {_expected(run, layer)}"
        )
    if coder.W_skip is not None:
        read = run.place_of(coder.cfg.in_site)
        branch, block = run.branch_of(place.layer)[1], run.model.block(layer)
        stage = next(stage for stage in block.stages if branch in stage)
        own = {("in", part_of(layer, stage[0])), *[("resid", layer)] * (stage == block.stages[0] and not block.beside)}
        if read[:2] not in own:
            raise ValueError(
                f"a coder with a skip from {coder.cfg.in_site} to {site} cannot be traced: expected one that reads what"
                " the branch's own norm reads or gives"
            )
    return place


def _expected(run: Run, layer: int | None) -> str:
    """Sites that a coder may predict."""
    if layer is None:
        return "blocks.{i}.mixer.hook_out_proj, or blocks.{i}.mixer.hook_x (hook_v), what enters a mixer's memory"
    found: list[str] = []
    for name, branch in run.model.block(layer).branches.items():
        found.append(out_site(run.model, layer, name))
        found += [] if u_site(branch) is None else [f"blocks.{layer}.{name}.{u_site(branch)}"]
    return ", ".join(found)
