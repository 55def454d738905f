"""Statistics and contexts of every feature, from one pass of a text through the model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from hooked_mamba.model_hash import model_hash
from hooked_mamba.models import HookedModel
from hooked_mamba.pieces import Pieces, digest, under
from saes.coder import SparseCoder
from saes.coder_hash import coder_hash
from saes.explorer.data import FeatureData
from saes.explorer.directions import BLOCK, Directions
from saes.explorer.tally import Tally
from saes.naming import Coders, check_fits, named_coders
from saes.options import OptionError
from saes.store.data import DataConfig, Text, rows_of
from saes.store.rows import Rows, RowSource, endless, take
from saes.targets import last_layer, sites_of, stream_values

X = TypeVar("X")

AT_ONCE = 1 << 24
"""Latents of one dictionary that are formed at a time."""


@torch.no_grad()
def collect(
    model: HookedModel,
    coders: Coders,
    tokens: Text,
    *,
    features: Sequence[int] | Mapping[str, Sequence[int]] | None = None,
    n_tokens: int | None = None,
    context_length: int = 128,
    pack: bool = True,
    boundaries: bool = False,
    rows_per_pass: int = 16,
    exclude_tokens: Sequence[int] = (),
    top: int = 20,
    sampled: int = 12,
    before: int = 24,
    after: int = 7,
    n_words: int = 10,
    n_neighbours: int = 10,
    labels: Mapping[int, str] | Mapping[str, Mapping[int, str]] | None = None,
    seed: int = 0,
    folder: str | Path | None = None,
    passes_per_piece: int = 16,
    progress: bool = True,
) -> dict[str, FeatureData]:
    """Read a text once, with all dictionaries on the same forward passes.

    With a folder, under torchrun, its processes share the text; a stopped collection continues when it is called again.
    What is found does not depend on how many processes there were.

    Parameters
    ----------
    model
        Whose activations the dictionaries read; run no further than they need.
    coders
        One dictionary, several, or several by name.
    tokens
        A text file, texts, token ids or a data set; see `saes.store.data`. Read once.
    features
        Indices of the features to include, for every dictionary or by its name; None: all.
    n_tokens
        Stop after so many positions; None: at the end of the text. No more rows are read than these need.
    context_length, pack, boundaries, rows_per_pass, exclude_tokens
        How text becomes rows, whether documents in a row are read each from an empty memory, and which token ids'
        positions do not count; see `DataConfig`.
    top, sampled, before, after
        Contexts kept, and tokens shown around their positions; see `Tally`.
    n_words, n_neighbours
        Tokens that a feature promotes or suppresses, and features of nearest decoder direction.
    labels
        Feature -> name; with several dictionaries, dictionary's name -> such a mapping.
    seed
        Of the order of documents, and of the sample.
    folder
        For results in pieces (see :mod:`hooked_mamba.pieces`); None: this process reads everything.
    passes_per_piece
        Forward passes whose results are written together.
    progress
        Whether a progress bar is shown.

    Returns
    -------
    dict
        Name -> data about that dictionary.
    """
    named = named_coders(coders)
    reads = {name: check_fits(coder, model, name)[0] for name, coder in named.items()}
    data = DataConfig(
        context_length=context_length,
        pack=pack,
        boundaries=boundaries,
        rows_per_pass=rows_per_pass,
        epochs=1,
        column="text",
        seed=seed,
    )
    rows = rows_of(tokens, model, data)
    if n_tokens is None and endless(rows):
        raise OptionError("this source of rows never ends: give the number of positions to read, n_tokens=")
    reader = Reader(model, named, reads)
    asked = features if isinstance(features, Mapping) else dict.fromkeys(named, features)
    if set(asked) != set(named):
        raise OptionError(f"features are of {', '.join(asked)}, and the dictionaries are {', '.join(named)}")
    chosen = {name: chosen_features(asked[name], coder.cfg.d_sae, name) for name, coder in named.items()}

    def fresh(piece: int = 0) -> dict[str, Tally]:
        return {
            name: Tally(
                len(chosen[name]), top=top, sampled=sampled, before=before, after=after, seed=seed_of(seed, piece)
            )
            for name in named
        }

    def tally_up(tallies: Mapping[str, Tally], batch: Rows, counted: Tensor) -> None:
        for name, z in reader(batch):
            z = z if features is None else z[..., chosen[name].to(z.device)]
            tallies[name].add(z, batch.tokens, counted, batch.real)

    batches = counted_rows(rows, reader, n_tokens, rows_per_pass, exclude_tokens, progress and folder is None)
    tallies = fresh()
    if folder is None:
        for batch, counted in batches:
            tally_up(tallies, batch, counted)
    else:
        work = {
            "model": model_hash(model),
            "dictionaries": {name: coder_hash(coder) for name, coder in named.items()},
            "features": {name: digest(some) for name, some in chosen.items()},
            "rows": rows.digest(),
            "n_tokens": n_tokens,
            "rows_per_pass": rows_per_pass,
            "exclude_tokens": [int(token) for token in exclude_tokens],
            "kept": [top, sampled, before, after, seed],
            "passes_per_piece": passes_per_piece,
        }

        def one(piece: int, group: list[tuple[Rows, Tensor]]) -> dict[str, Tensor]:
            mine = fresh(piece)
            for batch, counted in group:
                tally_up(mine, batch, counted)
            return {f"{name}/{key}": value for name, tally in mine.items() for key, value in tally.tensors().items()}

        pieces = Pieces(folder, work).run(
            in_groups(batches, passes_per_piece), one, progress=progress, description="reading"
        )
        for found in pieces:
            for name, tally in tallies.items():
                tally.merge(under(f"{name}/", found))
    if any(tally.n_tokens == 0 for tally in tallies.values()):
        raise OptionError("there is nothing to show: every position of the text is excluded")
    given = _labels_by_name(labels, named)
    blocks = [(name, block) for name in named for block in chosen[name].split(BLOCK)]

    def point(piece: int, part: tuple[str, Tensor]) -> dict[str, Tensor]:
        name, block = part
        return Directions.of(model, named[name], block, n_words, n_neighbours).tensors()

    if folder is None:
        pointed: Iterable[Mapping[str, Tensor]] = (point(i, part) for i, part in enumerate(blocks))
    else:
        pointed = Pieces(Path(folder) / "directions", work | {"n_words": n_words, "n_neighbours": n_neighbours}).run(
            blocks, point, total=len(blocks), progress=progress, description="directions"
        )
    directions: dict[str, list[Mapping[str, Tensor]]] = {name: [] for name in named}
    for (name, _), rankings in zip(blocks, pointed, strict=True):
        directions[name].append(rankings)
    return {
        name: summary(name, coder, chosen[name], tallies[name], model, Directions.joined(directions[name]), given[name])
        for name, coder in named.items()
    }


def chosen_features(features: Sequence[int] | None, d_sae: int, name: str) -> Tensor:
    """Indices of the chosen features, checked."""
    if features is None:
        return torch.arange(d_sae)
    for feature in features:
        if not 0 <= feature < d_sae:
            raise OptionError(f"feature {feature} does not exist: {name} has features 0 to {d_sae - 1}")
    if not features or len(set(features)) != len(features):
        raise OptionError(f"features must be some numbers, each once; got {list(features)}")
    return torch.tensor(list(features), dtype=torch.long)


class Reader:
    """Latents of several dictionaries from one forward pass; `reads` names the stream of each."""

    def __init__(self, model: HookedModel, named: Mapping[str, SparseCoder], reads: Mapping[str, str]) -> None:
        self.model, self.named, self.reads = model, named, reads
        self.sites = list(dict.fromkeys(site for stream in reads.values() for site in sites_of(stream, model)))
        self.last = last_layer(self.sites)

    def rows_at_once(self, wanted: int, length: int) -> int:
        """Rows of a pass, fewer than requested if the latents would take too much memory."""
        widest = max(coder.cfg.d_sae for coder in self.named.values())
        return max(1, min(wanted, AT_ONCE // (widest * length)))

    def __call__(self, rows: Rows) -> Any:
        """(name, latents b l F) one after the other."""
        cache: Any
        _, cache = self.model.run_with_cache(
            rows.tokens,
            names_filter=self.sites,
            **rows.arguments(),
            return_type=None,
            stop_at_layer=None if self.last is None else self.last + 1,
        )
        beginnings = rows.beginnings()
        for name, coder in self.named.items():
            yield name, coder.encode(stream_values(self.reads[name], cache, self.model, beginnings=beginnings))


def counted_rows(
    rows: RowSource,
    reader: Reader,
    n_tokens: int | None,
    rows_per_pass: int,
    exclude_tokens: Sequence[int],
    progress: bool,
) -> Iterator[tuple[Rows, Tensor]]:
    """The rows of one forward pass after another, and which of their positions count, until `n_tokens` have."""
    n = 0  # positions counted; never read from the bar, which does not count while it is off
    with tqdm(total=n_tokens, unit=" tokens", unit_scale=True, desc="reading", disable=not progress) as bar:
        while n_tokens is None or n < n_tokens:
            wanted = rows_per_pass if n_tokens is None else min(rows_per_pass, -(-(n_tokens - n) // rows.length))
            batch = next_rows(rows, reader.rows_at_once(wanted, rows.length))
            if batch is None:
                break
            counted = batch.real & ~torch.isin(batch.tokens, torch.tensor(list(exclude_tokens), dtype=torch.long))
            if n_tokens is not None:
                counted = first_of(counted, n_tokens - n)
            yield batch, counted
            found = int(counted.sum())
            n += found
            bar.update(found)


def in_groups(batches: Iterator[X], n: int) -> Iterator[list[X]]:
    """n at a time; the last group may have fewer."""
    while group := list(islice(batches, n)):
        yield group


def seed_of(seed: int, piece: int) -> int:
    """The seed of a piece's sample; the first piece has that of a collection in one go."""
    return seed + 1_000_003 * piece


def next_rows(rows: RowSource, n: int) -> Rows | None:
    """The next rows, cut to the longest of them where all end in padding."""
    batch = take(rows, n)
    if batch is None:
        return None
    length = int(batch.real.any(0).nonzero().max()) + 1
    return batch.columns(slice(length))


def first_of(counted: Tensor, n: int) -> Tensor:
    """The first n of the counted positions."""
    flat = counted.flatten()
    return (flat & (flat.cumsum(0) <= n)).reshape(counted.shape)


def summary(
    name: str,
    coder: SparseCoder,
    features: Tensor,
    tally: Tally,
    model: HookedModel | None,
    directions: Directions,
    labels: Mapping[int, str],
    texts: Mapping[int, str] | None = None,
) -> FeatureData:
    """A tally's result and what decoder directions point at. `texts`: of the contexts' tokens, if not the model's."""
    top, sampled = tally.contexts(tally.top), tally.contexts(tally.sampled)
    promoted, suppressed, near = directions
    ids = [promoted.indices, suppressed.indices] if promoted is not None and suppressed is not None else []
    if texts is None:
        ids += [top.tokens, sampled.tokens]
    vocabulary = token_texts(model, ids) if model is not None and ids else {}
    return FeatureData(
        name=name,
        cfg=coder.cfg,
        features=features,
        n_tokens=tally.n_tokens,
        counts=tally.counts,
        largest=tally.largest,
        means=(tally.sums / tally.counts.clamp(min=1)).float(),
        histogram=tally.histograms.counts,
        bin_widths=tally.histograms.widths,
        top=top,
        sampled=sampled,
        promoted=promoted,
        suppressed=suppressed,
        neighbours=near,
        vocabulary={**vocabulary, **(texts or {})},
        labels=labels,
    )


def token_texts(model: HookedModel, ids: Sequence[Tensor]) -> dict[int, str]:
    """The text of each token id; its number where the model has no tokenizer."""
    found = [int(i) for i in torch.cat([part.flatten().long() for part in ids]).unique() if i >= 0]
    if model.tokenizer is None:
        return {i: f"#{i}" for i in found}
    return {i: model.to_single_str_token(i) for i in found}


def _labels_by_name(labels: Any, named: Mapping[str, SparseCoder]) -> dict[str, dict[int, str]]:
    if not labels:
        return {name: {} for name in named}
    flat = all(not isinstance(value, Mapping) for value in labels.values())
    if flat and len(named) > 1:
        raise OptionError(f"with several dictionaries, labels go by their names: {', '.join(named)}")
    nested = {next(iter(named)): labels} if flat else labels
    for name in nested:
        if name not in named:
            raise OptionError(f"labels are given for {name!r}, and the dictionaries are {', '.join(named)}")
    out: dict[str, dict[int, str]] = {}
    for name, coder in named.items():
        out[name] = {int(feature): str(text) for feature, text in nested.get(name, {}).items()}
        for feature in out[name]:
            if not 0 <= feature < coder.cfg.d_sae:
                raise OptionError(f"label of feature {feature}: {name} has features 0 to {coder.cfg.d_sae - 1}")
    return out
