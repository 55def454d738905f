"""Features as one HTML page that needs no network.

What the page shows is JSON inside it: an overview that is read when the page opens, and features in chunks that are
read when one of them is looked at. The script puts all text in as text, never as markup; no other script may run.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from torch import Tensor

import hooked_mamba
from hooked_mamba.durable import write_file
from saes.explorer.data import Contexts, FeatureData, Ranked

CHUNK = 32
"""Features read together."""

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Page:
    """A whole HTML page."""

    html: str

    def save(self, path: str | Path) -> Path:
        """Write it; an older file is replaced as a whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, self.html.encode("utf-8"))
        return path

    def __str__(self) -> str:
        return self.html

    def _repr_html_(self) -> str:
        """In a notebook, in a frame of its own."""
        return f'<iframe srcdoc="{html.escape(self.html)}" style="width:100%;height:720px;border:0"></iframe>'


def render(dictionaries: Sequence[FeatureData], title: str | None = None) -> Page:
    """One page about the features of one dictionary or several."""
    if not dictionaries:
        raise ValueError("there is no dictionary to show")
    words = Words()
    described = [_describe(data, words) for data in dictionaries]
    chunks: list[tuple[str, str]] = []
    for d, data in enumerate(dictionaries):
        rows = TextRows(data, words)
        features = [_feature(data, row, words, rows) for row in range(len(data.features))]
        for kind, parts in (("d", features), ("t", rows.rows)):
            chunks += [(f"{kind}{d}-{i}", as_json(part)) for i, part in enumerate(_chunks(parts))]
    overview = {"dictionaries": described, "words": words.texts, "chunk": CHUNK}
    script = _asset("page.js")
    template = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = template.from_string(_asset("page.html")).render(
        title=title or _title(dictionaries),
        style=Markup(_asset("page.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode(),
        overview=Markup(as_json(overview)),
        chunks=[(name, Markup(text)) for name, text in chunks],
        single=len(dictionaries) == 1 and len(dictionaries[0].features) == 1,
        several=len(dictionaries) > 1,
        version=hooked_mamba.__version__,
    )
    return Page(text)


def as_json(value: Any) -> str:
    """JSON that is safe inside an HTML page: nothing in it opens or closes a tag, and all of it is ASCII."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


class Words:
    """The page's table of token texts, which pieces of text refer to by index."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._places: dict[str, int] = {}

    def place(self, text: str) -> int:
        """The index of a text; new ones are appended."""
        found = self._places.setdefault(text, len(self.texts))
        if found == len(self.texts):
            self.texts.append(text)
        return found


class TextRows:
    """The rows of text that a dictionary's contexts are pieces of, each once: [row, first position, words].

    Rows hold the positions from the first to the last that some context shows, and -1 for what none shows.
    """

    def __init__(self, data: FeatureData, words: Words) -> None:
        shown = [_shown(contexts) for contexts in (data.top, data.sampled)]
        row, position, token = (np.concatenate(parts) for parts in zip(*shown, strict=True))
        order = np.lexsort((position, row))
        row, position, token = row[order], position[order], token[order]
        new = np.ones(len(row), dtype=bool)
        new[1:] = (row[1:] != row[:-1]) | (position[1:] != position[:-1])  # what several contexts show stays once
        row, position, token = row[new], position[new], token[new]
        ids, starts = np.unique(row, return_index=True)
        used, spelt = np.unique(token, return_inverse=True)
        word = np.array([words.place(data.vocabulary[int(i)]) for i in used], dtype=np.int64)[spelt]
        self.rows: list[list[Any]] = []
        for i, start, end in zip(ids.tolist(), starts, [*starts, len(row)][1:], strict=True):
            at = position[start:end] - position[start]
            line = np.full(int(at[-1]) + 1, -1, dtype=np.int64)
            line[at] = word[start:end]
            self.rows.append([i, int(position[start]), line.tolist()])
        self.place = {i: n for n, i in enumerate(ids.tolist())}
        """Row of the text -> which of `rows` it is."""


def _shown(contexts: Contexts) -> tuple[np.ndarray, ...]:
    """Every token that some context shows: its row, position and id."""
    tokens = contexts.tokens.flatten(0, 1).numpy()
    place, offset = ((tokens >= 0) & (contexts.values.flatten().numpy() > 0)[:, None]).nonzero()
    position = contexts.positions.flatten().numpy()[place] - contexts.before + offset
    return contexts.rows.flatten().numpy()[place], position, tokens[place, offset]


def _chunks(parts: list[Any]) -> Iterator[list[Any]]:
    for first in range(0, len(parts), CHUNK):
        yield parts[first : first + CHUNK]


@cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _title(dictionaries: Sequence[FeatureData]) -> str:
    first = dictionaries[0]
    if len(dictionaries) > 1:
        return f"Features of {len(dictionaries)} dictionaries"
    if len(first.features) == 1:
        return f"Feature {int(first.features[0])} of {first.name}"
    return f"Features of {first.name}"


def _describe(data: FeatureData, words: Words) -> dict[str, Any]:
    """A dictionary's part of the overview: what the list, sorting and search need."""
    cfg = data.cfg
    promoted = data.promoted.indices.tolist() if data.promoted is not None else [[]] * len(data.features)
    peaks = data.top.tokens[:, :, data.top.before].tolist()
    used = (data.top.values > 0).tolist()
    return {
        "name": data.name,
        "kind": cfg.kind,
        "architecture": cfg.architecture,
        "site": cfg.in_site,
        "out": cfg.out_site,
        "target": cfg.target,
        "k": cfg.k,
        "d_sae": cfg.d_sae,
        "model": cfg.model_name,
        "tokens": data.n_tokens,
        "features": None if len(data.features) == cfg.d_sae else data.features.tolist(),
        "counts": data.counts.tolist(),
        "largest": [_short(x) for x in data.largest.tolist()],
        "labels": {str(f): text for f, text in data.labels.items()},
        "peaks": [
            _often([data.vocabulary[t] for t, there in zip(tokens, shown, strict=True) if there], words)
            for tokens, shown in zip(peaks, used, strict=True)
        ],
        "promoted": [[words.place(data.vocabulary[t]) for t in row] for row in promoted],
        "lens": data.promoted is not None,
        "before": data.top.before,
        "after": data.top.tokens.shape[2] - data.top.before - 1,
    }


def _often(texts: list[str], words: Words) -> list[int]:
    """Distinct texts, the most frequent first."""
    distinct = dict.fromkeys(texts)
    return [words.place(text) for text in sorted(distinct, key=texts.count, reverse=True)]


def _feature(data: FeatureData, row: int, words: Words, text: TextRows) -> dict[str, Any]:
    """What the page shows of one feature."""
    counts = data.histogram[row].tolist()
    while counts and not counts[-1]:
        counts.pop()
    return {
        "mean": _short(float(data.means[row])),
        "width": float(data.bin_widths[row]),
        "bins": counts,
        "top": _contexts(data.top, row, text),
        "sampled": _contexts(data.sampled, row, text),
        "up": _ranked_words(data.promoted, row, data, words),
        "down": _ranked_words(data.suppressed, row, data, words),
        "near": _pairs(data.neighbours.indices[row], data.neighbours.values[row]),
    }


def _contexts(contexts: Contexts, row: int, text: TextRows) -> list[list[Any]]:
    """[activation, which row of the text, position, [distance, activation, ...], times] each.

    Pieces of equal tokens are shown once, as the strongest of them.
    """
    out: dict[bytes, list[Any]] = {}
    n = int((contexts.values[row] > 0).sum())  # those without a piece come last
    tokens = contexts.tokens[row, :n].numpy()
    activations = contexts.activations[row, :n].tolist()
    for slot, (value, text_row, position) in enumerate(
        zip(*(part[row, :n].tolist() for part in (contexts.values, contexts.rows, contexts.positions)), strict=True)
    ):
        said = tokens[slot].tobytes()
        if said in out:
            out[said][-1] += 1
            continue
        heat = [part for i, a in enumerate(activations[slot]) if a > 0 for part in (i - contexts.before, _short(a))]
        out[said] = [_short(value), text.place[text_row], position, heat, 1]
    return list(out.values())


def _ranked_words(ranked: Ranked | None, row: int, data: FeatureData, words: Words) -> list[list[Any]]:
    if ranked is None:
        return []
    return [
        [words.place(data.vocabulary[i]), _short(value)]
        for i, value in zip(ranked.indices[row].tolist(), ranked.values[row].tolist(), strict=True)
    ]


def _pairs(indices: Tensor, values: Tensor) -> list[list[Any]]:
    return [[i, round(value, 3)] for i, value in zip(indices.tolist(), values.tolist(), strict=True)]


def _short(x: float) -> float:
    """Four digits are more than a page shows."""
    return float(f"{x:.4g}")
