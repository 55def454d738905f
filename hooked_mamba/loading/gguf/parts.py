"""GGUF files that hold one model together, `name-00001-of-00003.gguf` and so on, as llama.cpp splits them.

Each says which part it is (`split.no`, from 0) and how many there are (`split.count`); the first has all other keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from hooked_mamba.loading.gguf.header import Header, read_header
from hooked_mamba.loading.gguf.keys import shown
from hooked_mamba.loading.tables import CheckpointError, some

__all__ = ["all_parts", "models_in", "name_of_all", "read_parts"]

PART = re.compile(r"(?P<model>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")

WHOLE = (0, 1)
"""`split.count` of a file that holds all of a model; `llama-gguf-split --merge` writes 0."""

MOST = 99999
"""What five digits can count."""


def name_of_all(name: str) -> str:
    """A file's name without which part it is: `model.gguf` of `model-00002-of-00003.gguf`."""
    found = PART.fullmatch(name)
    return f"{found['model']}.gguf" if found else name


def all_parts(name: str) -> str:
    """A pattern for the names of all parts of which one has this name; the name itself of a whole file."""
    found = PART.fullmatch(name)
    return f"{found['model']}-*-of-{found['count']}.gguf" if found else name


def models_in(names: Iterable[str]) -> list[str]:
    """One name for each model that files hold: of parts, the first that is there."""
    found: dict[str, str] = {}
    for name in sorted(names):
        found.setdefault(all_parts(name), name)
    return list(found.values())


def read_parts(path: Path) -> list[Header]:
    """The headers of all parts of the model of which a file is one, the first part first.

    Raises
    ------
    CheckpointError
        Parts are missing, or do not belong together.
    """
    header = read_header(path)
    count = header.keys.get("split.count", 1)
    if isinstance(count, int) and count in WHOLE:
        return [header]
    if not isinstance(count, int) or not 1 < count <= MOST:
        raise CheckpointError(f"{path}: the key split.count is {shown(count)}; expected a number of files")
    name = PART.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise CheckpointError(
            f"{path} is one of {count} files that hold one model, and its name does not say which others: expected"
            f" names such as model-00001-of-{count:05}.gguf"
        )
    paths = [path.with_name(f"{name['model']}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    missing = [one.name for one in paths if not one.is_file()]
    if missing:
        raise CheckpointError(f"{path} is one of {count} files that hold one model; missing are {some(missing)}")
    headers = [header if one == path else read_header(one) for one in paths]
    _check(headers)
    return headers


def _check(headers: Sequence[Header]) -> None:
    """Refuse parts that are not those of one model."""
    seen: dict[str, Header] = {}
    for i, header in enumerate(headers):
        for key, expected in (("split.no", i), ("split.count", len(headers))):
            found = header.keys.get(key)
            if found != expected:
                raise CheckpointError(f"{header.path}: the key {key} is {shown(found)}; expected {expected}")
        for name in header.tensors:
            if name in seen:
                raise CheckpointError(f"the tensor {name} is both in {seen[name].path} and in {header.path}")
            seen[name] = header
    total = headers[0].keys.get("split.tensors.count", len(seen))
    if total != len(seen):
        raise CheckpointError(
            f"{headers[0].path}: the key split.tensors.count is {shown(total)}, and its {len(headers)} parts have"
            f" {len(seen)} tensors"
        )
