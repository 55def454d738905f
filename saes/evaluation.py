"""Evaluating coders: reconstruction, sparsity, and the loss of the model when it runs on their output.

1. A pass over the text collects reconstruction and sparsity of all coders, and the means of what they predict.
2. A second pass runs every batch unchanged, with each coder spliced in, with zeros there, with the means there, and
with all coders, all zeros, all means at once.

Sums are kept in float64 over positions, so that the size of batches does not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from hooked_mamba.pieces import Pieces, digest, under
from saes.coder import SparseCoder
from saes.coder_hash import coder_hash
from saes.metrics.model_loss import LossSums, next_token_log_probs
from saes.metrics.reconstruction import ReconstructionSums
from saes.metrics.sparsity import SparsitySums
from saes.naming import Coders, check_fits, named_coders
from saes.report import ABLATION, LOSS, RECONSTRUCTION, SPARSITY, Report, Scores, chosen_metrics
from saes.rewriting import Rewrite, rewritten
from saes.splicing import splice
from saes.store.rows import Rows, RowSource, endless, take
from saes.targets import all_streams, last_layer, read, sites_of, streams_of

Data = str | Sequence[Any] | Tensor | Rows | RowSource | Iterable[Any]
"""Text, texts, token ids (b l), rows with their mask, a source of rows, or batches of any of these."""

TOGETHER = "all together"
"""The report's name for all coders at once."""


def evaluate(
    model: HookedModel,
    coders: Coders,
    data: Data,
    metrics: Sequence[str] | None = None,
    *,
    attention_mask: Tensor | None = None,
    exclude_tokens: Sequence[int] = (),
    batch_size: int = 8,
    n_tokens: int | None = None,
    together: bool | None = None,
    folder: str | Path | None = None,
    batches_per_piece: int = 16,
    progress: bool = True,
) -> Report:
    """Evaluate coders on text that they were not trained on.

    With a folder, under torchrun, its processes share the work; a stopped evaluation continues when it is called again.
    The figures do not depend on how many processes there were.

    Parameters
    ----------
    coders
        One, several, or several by name.
    data
        Text, texts, token ids, or rows; see `Data`.
    metrics
        Names or groups of figures, see `saes.report.METRICS` and `GROUPS`; None: all. Only what they need is run.
    attention_mask
        b l, for token ids. Padding is never counted and stays as it is.
    exclude_tokens
        Token ids, such as `<|endoftext|>`, whose positions are neither replaced nor counted in reconstruction and
        sparsity. Their losses count.
    batch_size
        Rows per pass.
    n_tokens
        Stop after so many real tokens; required if the source has no end.
    together
        Whether all coders are replaced at once too; None: if there are several, and no two predict one site.
    folder
        For results in pieces (see :mod:`hooked_mamba.pieces`); None: this process does everything.
    batches_per_piece
        Batches whose sums are written together.
    progress
        Show a bar.

    Raises
    ------
    ValueError
        An unknown metric, a coder that does not fit the model, or no data; a folder that holds another evaluation.
    """
    named = named_coders(coders)
    for name, coder in named.items():
        check_fits(coder, model, name)
    wanted = chosen_metrics(metrics)
    together = _together(named) if together is None else together
    batches = list(_batches(model, data, attention_mask, batch_size, n_tokens))
    if not batches:
        raise ValueError("there is nothing to evaluate: the data are empty")
    first = bool(set(wanted) & {*RECONSTRUCTION, *SPARSITY}) or bool(set(wanted) & set(ABLATION))
    second = bool(set(wanted) & {*LOSS, *ABLATION})
    run = _Run(model, named, tuple(exclude_tokens), wanted)
    tokens = sum(int(run.counted(rows).sum()) for rows in batches)
    if folder is not None:
        work = {
            "model": model_hash(model),
            "coders": {name: coder_hash(coder) for name, coder in named.items()},
            "metrics": list(wanted),
            "together": together,
            "exclude_tokens": [int(token) for token in exclude_tokens],
            "batches": [digest(part) for rows in batches for part in (rows.tokens, rows.real)],
            "batches_per_piece": batches_per_piece,
        }
        groups = [batches[i : i + batches_per_piece] for i in range(0, len(batches), batches_per_piece)]
        if first:
            run.in_pieces(Pieces(Path(folder) / "reconstruction", work), groups, run.read_all, progress)
        if second:
            run.in_pieces(
                Pieces(Path(folder) / "loss", work), groups, partial(run.lose_all, together=together), progress
            )
        return run.report(tokens, together and second)
    with tqdm(total=len(batches) * (first + second), disable=not progress, desc="evaluate", leave=False) as bar:
        if first:
            for rows in batches:
                run.read(rows)
                bar.update()
        if second:
            for rows in batches:
                run.lose(rows, together)
                bar.update()
    return run.report(tokens, together and second)


def evaluate_activations(
    coders: Coders,
    batches: Iterable[Mapping[str, Tensor]],
    metrics: Sequence[str] | None = None,
    *,
    n_tokens: int | None = None,
) -> Report:
    """Reconstruction and sparsity on given activations, such as those of an `ActivationStore`.

    Parameters
    ----------
    batches
        Stream -> n width, see `saes.targets`.
    metrics
        As in :func:`evaluate`, without losses, which need the model.
    n_tokens
        Stop after so many positions; required if the source has no end.

    Raises
    ------
    ValueError
        A metric that needs the model, or no data.
    """
    wanted = chosen_metrics(["reconstruction", "sparsity"] if metrics is None else metrics)
    need_model = [name for name in wanted if name in (*LOSS, *ABLATION)]
    if need_model:
        raise ValueError(f"{', '.join(need_model)} need the model: use evaluate(model, coders, tokens)")
    if n_tokens is None and endless(batches):
        raise ValueError("this source of activations never ends: give the number of positions to evaluate, n_tokens=")
    named = named_coders(coders)
    sums = {name: _Sums(coder) for name, coder in named.items()}
    n = 0
    for batch in batches:
        for name, coder in named.items():
            x, y = read(coder.cfg, batch)
            sums[name].add(x, y)
        n += len(next(iter(batch.values())))
        if n_tokens is not None and n >= n_tokens:
            break
    if n == 0:
        raise ValueError("there is nothing to evaluate: the data are empty")
    models = {str(coder.cfg.model_name) for coder in named.values() if coder.cfg.model_name}
    scores = tuple(s.scores(name, wanted, {}) for name, s in sums.items())
    return Report(", ".join(sorted(models)) or "activations", n, 0, scores)


class _Sums:
    """One coder's reconstruction and sparsity so far."""

    def __init__(self, coder: SparseCoder) -> None:
        self.coder = coder
        self.reconstruction = ReconstructionSums(coder.cfg.d_out)
        self.sparsity = SparsitySums(coder.cfg.d_sae)

    @torch.no_grad()
    def add(self, x: Tensor, y: Tensor) -> None:
        codes = self.coder.encode_topk(x)
        self.reconstruction.add(y, self.coder.decode_sparse(codes, x))
        self.sparsity.add(codes)

    def scores(self, name: str, wanted: Sequence[str], losses: Mapping[str, float | None]) -> Scores:
        found: dict[str, float | None] = dict(losses)
        edges: tuple[float, ...] = ()
        histogram: tuple[int, ...] = ()
        if self.reconstruction.n:
            sparsity = self.sparsity.result()
            found |= self.reconstruction.result().to_dict()
            found |= {"l0": sparsity.l0, "dead_share": sparsity.dead_share, "dense_share": sparsity.dense_share}
            if "density" in wanted:
                edges, histogram = sparsity.edges, sparsity.histogram
        values = {metric: found[metric] for metric in wanted if metric in found}
        return Scores(name, self.coder.extra_repr(), values, edges, histogram)


class _Run:
    """The two passes."""

    def __init__(
        self, model: HookedModel, named: dict[str, SparseCoder], exclude: tuple[int, ...], wanted: tuple[str, ...]
    ) -> None:
        self.model, self.named, self.exclude, self.wanted = model, named, exclude, wanted
        self.clear()
        last = last_layer([s for stream in all_streams(c.cfg for c in named.values()) for s in sites_of(stream, model)])
        self.stop = None if last is None else last + 1

    def clear(self) -> None:
        """No position read yet."""
        self.sums = {name: _Sums(coder) for name, coder in self.named.items()}
        self.losses = {name: LossSums() for name in (*self.named, TOGETHER)}

    def in_pieces(
        self, pieces: Pieces, groups: list[list[Rows]], work: Callable[[list[Rows]], dict[str, Tensor]], progress: bool
    ) -> None:
        """One pass in pieces, then all their sums, in order."""
        about = f"evaluate ({pieces.folder.name})"
        pieces.run(groups, lambda _, g: work(g), total=len(groups), progress=progress, description=about)
        for found in pieces:
            for name, sums in self.sums.items():
                if f"{name}/reconstruction/sums" in found:
                    sums.reconstruction.merge(under(f"{name}/reconstruction/", found))
                    sums.sparsity.merge(under(f"{name}/sparsity/", found))
            for name, losses in self.losses.items():
                if f"{name}/loss/sums" in found:
                    losses.merge(under(f"{name}/loss/", found))

    def read_all(self, group: list[Rows]) -> dict[str, Tensor]:
        """The first pass over some batches alone: their sums."""
        kept, self.sums = self.sums, {name: _Sums(coder) for name, coder in self.named.items()}
        for rows in group:
            self.read(rows)
        found, self.sums = self.sums, kept
        parts = {f"{name}/reconstruction/": sums.reconstruction.tensors() for name, sums in found.items()}
        parts |= {f"{name}/sparsity/": sums.sparsity.tensors() for name, sums in found.items()}
        return {prefix + key: value for prefix, part in parts.items() for key, value in part.items()}

    def lose_all(self, group: list[Rows], together: bool) -> dict[str, Tensor]:
        """The second pass over some batches alone: their sums."""
        kept, self.losses = self.losses, {name: LossSums() for name in self.losses}
        for rows in group:
            self.lose(rows, together)
        found, self.losses = self.losses, kept
        return {f"{name}/loss/{key}": value for name, one in found.items() for key, value in one.tensors().items()}

    def counted(self, rows: Rows) -> Tensor:
        """Positions that are replaced and counted."""
        counted = rows.real
        for token in self.exclude:
            counted = counted & (rows.tokens != token)
        return counted

    @torch.no_grad()
    def read(self, rows: Rows) -> None:
        """The first pass over a batch."""
        counted = self.counted(rows)

        def reading(sums: _Sums) -> Rewrite:
            def look(x: Tensor, y: Tensor) -> None:
                sums.add(x[counted], y[counted])

            return Rewrite(sums.coder.cfg, look)

        with rewritten(self.model, [reading(sums) for sums in self.sums.values()]):
            self.model(rows.tokens, **rows.arguments(), return_type=None, stop_at_layer=self.stop)

    @torch.no_grad()
    def lose(self, rows: Rows, together: bool) -> None:
        """The second pass over a batch."""
        counted = self.counted(rows)

        def log_probs(context: AbstractContextManager | None = None) -> tuple[Tensor, Tensor]:
            if context is None:
                logits = self.model(rows.tokens, **rows.arguments())
            else:
                with context:
                    logits = self.model(rows.tokens, **rows.arguments())
            return next_token_log_probs(logits, rows.tokens, rows.real, rows.starts)

        clean, next_tokens = log_probs()
        several = {TOGETHER: self.named} if together else {}
        for name, part in ({name: {name: coder} for name, coder in self.named.items()} | several).items():
            losses = self.losses[name]
            losses.add("clean", clean, next_tokens)
            losses.add("spliced", *log_probs(splice(self.model, part, positions=counted)), clean)
            for baseline in ("zero", "mean"):
                if {f"ce_{baseline}", f"ce_recovered_{baseline}"} & set(self.wanted):
                    rewrites = [Rewrite(coder.cfg, self._constant(n, baseline)) for n, coder in part.items()]
                    losses.add(baseline, *log_probs(rewritten(self.model, rewrites, counted)))

    def _constant(self, name: str, baseline: str) -> Callable[[Tensor, Tensor], Tensor]:
        mean = self.sums[name].reconstruction.mean

        def new(x: Tensor, y: Tensor) -> Tensor:
            return torch.zeros_like(y) if baseline == "zero" else mean.to(y).expand_as(y)

        return new

    def report(self, tokens: int, together: bool) -> Report:
        """The report on this many counted positions."""
        losses = {name: sums.result() for name, sums in self.losses.items()}
        scores = tuple(sums.scores(name, self.wanted, losses[name]) for name, sums in self.sums.items())
        both = None
        if together:
            values = {metric: losses[TOGETHER][metric] for metric in self.wanted if metric in losses[TOGETHER]}
            both = Scores(TOGETHER, f"{len(self.named)} coders", values)
        predictions = self.losses[next(iter(self.named))].n["clean"]
        return Report(self.model.cfg.model_name, tokens, predictions, scores, both)


def _together(named: Mapping[str, SparseCoder]) -> bool:
    sites = [streams_of(coder.cfg)[1].partition("@")[0] for coder in named.values()]
    return len(sites) > 1 and len(set(sites)) == len(sites)


def _batches(
    model: HookedModel, data: Any, mask: Tensor | None, batch_size: int, n_tokens: int | None
) -> Iterator[Rows]:
    """Rows of any data, at most `batch_size` at a time, until `n_tokens` real tokens were read."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    n = 0
    for rows in _rows(model, data, mask, batch_size, unlimited=n_tokens is None):
        for some in rows.split(batch_size):
            yield some.to(model.device)
            n += int(some.real.sum())
            if n_tokens is not None and n >= n_tokens:
                return


def _rows(model: HookedModel, data: Any, mask: Tensor | None, batch_size: int, unlimited: bool) -> Iterator[Rows]:
    if mask is not None and not (isinstance(data, Tensor) or _is_ids(data)):
        raise ValueError("attention_mask= goes with token ids; texts are masked by themselves, rows bring their own")
    if isinstance(data, Rows):
        yield data
    elif isinstance(data, Tensor | str) or _is_ids(data):
        yield _as_rows(model, data, mask)
    elif hasattr(data, "next_row"):
        if unlimited and endless(data):
            raise ValueError("this source of rows never ends: give the number of tokens to evaluate on, n_tokens=")
        while (rows := take(data, batch_size)) is not None:
            yield rows
    elif isinstance(data, Sequence) and all(isinstance(text, str) for text in data):
        for i in range(0, len(data), batch_size):  # padded batch by batch
            yield _as_rows(model, list(data[i : i + batch_size]), None)
    elif isinstance(data, Iterable):
        for part in data:
            yield from _rows(model, part, None, batch_size, unlimited)
    else:
        raise TypeError(f"expected text, token ids or rows, got {type(data).__name__}")


def _is_ids(data: Any) -> bool:
    """Whether these are lists of whole numbers, or lists of lists of them."""
    while isinstance(data, list) and data:
        data = data[0]
    return isinstance(data, int)


def _as_rows(model: HookedModel, data: Any, mask: Tensor | None) -> Rows:
    tokens, found = model.input_to_tokens(data)
    mask = found if mask is None else torch.as_tensor(mask, device=tokens.device)
    if mask is not None and mask.shape != tokens.shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, expected {list(tokens.shape)} like the tokens")
    return Rows(tokens, torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask.bool())
