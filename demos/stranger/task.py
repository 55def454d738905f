"""Is it the package's model, and does it do the task? Sections 1 and 2."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demos.stranger.model import HookedStranger, tokens_of
from demos.stranger.text import LANGUAGES, Document, documents, languages_of, shuffled
from demos.studies.common import percent
from demos.studies.report import Section, Table

DISTANCES = ((1, 3), (4, 10), (11, 30), (31, 10**6))
"""Characters from the nearest switch of languages."""


def package_logits(text: str) -> np.ndarray:
    """What the package's own forward pass, in numpy, gives: l classes."""
    from typeseg import _numpy_backend
    from typeseg._tokenize import text_to_bytes

    with (files("typeseg") / "data" / "mamba_al.npz").open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        weights = _numpy_backend.Weights({name.replace("__", "/"): arrays[name] for name in arrays.files})
    return _numpy_backend.mamba_forward(weights, text_to_bytes(text))


def logits_of(model: HookedStranger, some: list[Document], at_once: int = 16) -> Float[Tensor, "b l V"]:
    """The logits of documents of one length."""
    batches = (some[i : i + at_once] for i in range(0, len(some), at_once))
    return torch.cat([model(tokens_of(*(one.text for one in batch))) for batch in batches])


def class_ids(labels: list[str]) -> Int[Tensor, " 3"]:
    """The classes of the three languages."""
    return torch.tensor([labels.index(name) for name in LANGUAGES])


def hits(model: HookedStranger, labels: list[str], some: list[Document]) -> Bool[Tensor, "b l"]:
    """Where the largest of all logits is the language's that was written."""
    return logits_of(model, some).argmax(-1) == class_ids(labels)[languages_of(some)]


def to_switch(one: Document) -> Float[Tensor, " l"]:
    """Characters to the nearest place where the language changes, 1 right beside it; inf where there is none."""
    which = torch.tensor(one.language)
    switches = (which[1:] != which[:-1]).nonzero().flatten() + 0.5
    if not len(switches):
        return torch.full((len(which),), torch.inf)
    return (torch.arange(len(which))[:, None] - switches).abs().min(1).values + 0.5


def same_section(model: HookedStranger, some: list[Document]) -> Section:
    """Against the package."""
    theirs = torch.from_numpy(np.stack([package_logits(one.text) for one in some]))
    ours = logits_of(model, some)
    off = float((ours - theirs).abs().max())
    same = float((ours.argmax(-1) == theirs.argmax(-1)).float().mean())
    return Section(
        "Is it the same model?",
        f"The package's own forward pass, in numpy, beside ours on {len(some)} texts of {len(some[0].text)} characters:"
        f" logits differ by less than {10 ** np.ceil(np.log10(max(off, 1e-9))):.0e} (the largest is"
        f" {float(theirs.abs().max()):.0f}), and {percent(same)} of the characters get the same class."
        " Every site that the following sections read or write lies between those two ends.",
    )


def task_section(model: HookedStranger, labels: list[str], some: list[Document]) -> Section:
    """Accuracies, and what they are with the characters shuffled."""
    logits, wanted = logits_of(model, some), languages_of(some)
    three = class_ids(labels)
    found, among = logits.argmax(-1), logits[..., three].argmax(-1)
    mixed = [shuffled(one, i) for i, one in enumerate(some)]
    control = hits(model, labels, mixed)
    rows = []
    for i, name in enumerate(LANGUAGES):
        here = wanted == i
        others = found[here & (found != three[i])]
        counts = torch.bincount(others, minlength=len(labels))
        worst = ", ".join(
            f"{labels[int(j)]} {percent(float(counts[j]) / int(here.sum()))}"
            for j in counts.topk(2).indices
            if counts[j]
        )
        shares = (found[here] == three[i], among[here] == i, control[here])
        rows.append([name, *(percent(float(share.float().mean())) for share in shares), worst])
    distance = torch.stack([to_switch(one) for one in some])
    right = found == three[wanted]
    near = []
    for low, high in DISTANCES:
        here = (distance >= low) & (distance <= high)
        until = f"{low} to {high}" if high < 10**6 else f"more than {low - 1}"
        near.append(f"{until} characters away {percent(float(right[here].float().mean()))}")
    return Section(
        "Does it tell the languages apart?",
        f"{len(some)} documents of {len(some[0].text)} characters that switch between Python, HTML and SQL. Each"
        " character counts by itself; the model may answer with any of its 35 classes. “Of three” takes the largest of"
        " the three logits alone. The control has the characters of every language in random order: what counts of"
        " characters tell.",
        Table(["language", "right", "right of three", "control: shuffled", "taken for"], rows),
        after="By distance from the nearest switch: " + ", ".join(near) + ".",
    )


def accuracy(model: HookedStranger, labels: list[str], some: list[Document]) -> float:
    """The share of characters that get the language they were written in."""
    return float(hits(model, labels, some).float().mean())


def test_documents(options: Any) -> list[Document]:
    """Mixed documents that nothing is fitted on."""
    return documents(options.test, options.length, seed=1)
