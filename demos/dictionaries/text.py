"""Rows of tokens to train dictionaries on: a text file, mixed with told stories where the model was trained on them."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from demos.tinystories.cues import tell_cues
from demos.tinystories.grammar import tell_stories
from hooked_mamba.models import HookedModel
from saes.store import DataConfig, DocumentRows, ListedDocuments, MixedRows, RowSource, read_text_file, rows_of


class Mix(NamedTuple):
    """What a model was told beside real text (`demos/tinystories`)."""

    share: float
    """Of the training rows."""
    stories: int
    """Of the grammar."""
    cues: int = 0
    """Stories in which a noun alone tells the feeling."""
    seed: int = 0
    """Of both."""

    def tell(self, most: int | None = None) -> list[str]:
        """Those stories; with `most`, at most so many of each kind."""
        counts = (n if most is None else min(n, most) for n in (self.stories, self.cues))
        return [s for tell, n in zip((tell_stories, tell_cues), counts, strict=True) for s in tell(n, self.seed)]


TOLD, CUES = Mix(0.15, 8000), Mix(0.35, 3000, 12000)
MIXES = {
    **dict.fromkeys(("tinystories-4l", "tinystories-mamba2-4l", "tinystories-hybrid-4l"), TOLD),
    "tinystories-told-4l": CUES,
    "tinystories-told-mamba2-4l": Mix(0.5, 3000, 24000),
    "tinystories-told-hybrid-4l": Mix(0.6, 1000, 30000, seed=1),
}
"""Bundled model -> the mix of its (last) training; a model that is not here saw real text alone."""


def training_rows(
    model: HookedModel,
    text: Path | None,
    dataset: str | None,
    share: float | None,
    data: DataConfig,
    samples: tuple[Path, float] | None = None,
) -> RowSource:
    """Rows of a text file or of a streamed hub data set, and the told stories' share of them.

    Parameters
    ----------
    model
        For its tokenizer and the share of told stories it was trained with.
    text, dataset
        One of the two: a file with documents parted by `data.separator`, or a data set's name on the hub.
    share
        Share of rows from the grammar; None: what the model was trained with.
    data
        Length of rows, seeds, column.
    samples
        A file of stories that the model told itself, and their share of the rows; the rest is mixed as without.

    Raises
    ------
    ValueError
        If not exactly one of `text` and `dataset` is given.
    """
    if (text is None) == (dataset is None):
        raise ValueError("give --text FILE or --dataset NAME, one of them")
    mix = MIXES.get(model.cfg.model_name, TOLD if share else Mix(0.0, 0))
    share = mix.share if share is None else share
    source: Any = streamed(dataset) if dataset is not None else read_text_file(str(text), data.separator)
    parts = [(rows_of(source, model, data), 1 - share)]

    def encode(story: str) -> list[int]:
        return model._ids(story, prepend_bos=False)

    def listed(stories: list[str]) -> RowSource:
        documents = ListedDocuments(stories, encode, seed=data.seed)
        return DocumentRows(documents, data.context_length, separator=model.eos_token_id)

    if share:
        parts.append((listed(mix.tell()), share))
    if samples is not None:
        file, part = samples
        parts = [(rows, (1 - part) * weight) for rows, weight in parts]
        parts.append((listed(list(read_text_file(str(file), data.separator))), part))
    return parts[0][0] if len(parts) == 1 else MixedRows(parts, seed=data.seed)


def told_by(args: argparse.Namespace) -> tuple[Path, float] | None:
    """`samples` of :func:`training_rows` from a command line's --samples and --samples-share."""
    return None if args.samples is None else (args.samples, args.samples_share)


def streamed(name: str) -> Iterable[Any]:
    """A hub data set's training split, streamed.

    Raises
    ------
    ImportError
        If `datasets` is not installed.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError("--dataset needs the package: pip install datasets") from error
    return load_dataset(name, split="train", streaming=True)
