"""Rows of tokens to train dictionaries on: a text file, mixed with told stories where the model was trained on them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from demos.tinystories.grammar import tell_stories
from hooked_mamba.models import HookedModel
from saes.store import DataConfig, DocumentRows, ListedDocuments, MixedRows, RowSource, read_text_file, rows_of

TOLD = {"tinystories-4l": 0.15, "tinystories-mamba2-4l": 0.15}
"""Share of the training rows that the grammar told, by model (`demos/tinystories`)."""

STORIES = 8000
"""Stories of the grammar that those models were trained on."""


def training_rows(
    model: HookedModel, text: Path | None, dataset: str | None, share: float | None, data: DataConfig
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

    Raises
    ------
    ValueError
        If not exactly one of `text` and `dataset` is given.
    """
    if (text is None) == (dataset is None):
        raise ValueError("give --text FILE or --dataset NAME, one of them")
    share = TOLD.get(model.cfg.model_name, 0.0) if share is None else share
    source: Any = streamed(dataset) if dataset is not None else read_text_file(str(text), data.separator)
    rows = rows_of(source, model, data)
    if not share:
        return rows

    def encode(story: str) -> list[int]:
        return model._ids(story, prepend_bos=False)

    told = ListedDocuments(list(tell_stories(STORIES, 0)), encode, seed=data.seed)
    told_rows = DocumentRows(told, data.context_length, separator=model.eos_token_id)
    return MixedRows([(rows, 1 - share), (told_rows, share)], seed=data.seed)


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
