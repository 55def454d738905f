"""Reading a coder's files without trusting them: their location, their contents and what is expected."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor

from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.tables import LazyState
from hooked_mamba.loading.tensor_files import open_bin, open_safetensors, read_json, some
from saes.options import RepeatedKeyError, unique_keys

DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)}
"""Number formats of a coder, by name."""

STORED = {**DTYPES, "float8_e4m3fn": torch.float8_e4m3fn}
"""Number formats that weights of our own files may have. One in float8 is a float32 coder whose matrices were rounded;
in others' files float8 is refused, as it may need a scale that is not there."""

FINITE_AT_ONCE = 1 << 24
"""Numbers looked at together when all must be finite."""


MESSAGE = 1200
"""Characters of a message; a file's values, which are shown in it, may be of any length."""

WRONG = 200
"""Characters of a wrong value that are compared with the right ones."""

TEXT = 500
"""Characters that a text in a file, such as a model's name, may have."""


class CoderFileError(CheckpointError):
    """A coder's files that cannot be read, or a coder that cannot be written as asked.

    A long message, which shows a long value, loses its middle.
    """

    def __init__(self, message: str) -> None:
        if len(message) > MESSAGE:
            part = MESSAGE // 2
            cut = len(message) - 2 * part
            message = f"{message[:part]} [{cut:,} characters left out] {message[-part:]}"
        super().__init__(message)


@dataclass(frozen=True)
class Hints:
    """What a caller says about a coder beyond, or against, what its files say."""

    k: int | None = None
    in_site: str | None = None
    out_site: str | None = None
    target: Literal["block", "local"] | None = None
    reads: Literal["normalized", "resid"] | None = None
    model_name: str | None = None
    norm_factor: float | int | None = None
    """What a SAELens coder with normalize_activations="expected_average_only_in" multiplies its input by."""
    apply_b_dec_to_input: bool | None = None
    """Whether b_dec is subtracted from the input, of a `.pt` file, which does not say so; None: no."""
    place: Callable[[object, int, str, Path], str] | None = None
    """(what the file says, width, "in_site" or "out_site", file) -> the site in a model; see `saes.placing`."""

    def __post_init__(self) -> None:
        factor = self.norm_factor
        if factor is not None and not (isinstance(factor, float | int) and 0 < factor < float("inf")):
            raise CoderFileError(f"norm_factor must be a number above 0, got {factor!r}")


def nearest(wrong: object, right: Iterable[str]) -> str:
    """Part of a message: the nearest valid choice, if one is near."""
    near = difflib.get_close_matches(str(wrong)[:WRONG], list(right), n=1, cutoff=0.4)
    return f"; nearest: {near[0]!r}" if near else ""


def plain_file(path: Path) -> Path:
    """`path`, if it is a regular file of its own folder.

    A link may lead elsewhere in the folder, or from a snapshot in the hub client's cache to that cache's blobs;
    one that leads anywhere else is refused: who shares a folder does not choose what else is read on this machine.

    Raises
    ------
    CoderFileError
        If it is missing, no regular file, or a link out of its folder.
    """
    if path.is_symlink():
        target, home = path.resolve(), path.parent.resolve()
        blobs = [folder / "blobs" for folder in home.parents if (folder / "snapshots") in (home, *home.parents)]
        if not any(target.is_relative_to(folder) for folder in (home, *blobs)):
            raise CoderFileError(f"{path} is a link that leads out of its folder, to {target}; expected the file")
        if not target.exists():
            raise CoderFileError(f"{path} is a link to {target}, which is not there")
    if not path.exists():
        raise CoderFileError(f"{path} is not there")
    if not path.is_file():
        raise CoderFileError(f"{path} is {'a folder' if path.is_dir() else 'no regular file'}; expected a file")
    return path


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a key that stands in it twice is an error."""
    try:
        values = read_json(plain_file(path))
        no_key_twice(path)
        return values
    except CoderFileError:
        raise
    except (CheckpointError, TypeError) as error:
        raise CoderFileError(str(error) if isinstance(error, CheckpointError) else f"{path}: {error}") from None


def no_key_twice(path: Path) -> None:
    """Raise CoderFileError where an object in a JSON file has a key twice: readers differ in which one counts."""
    try:
        json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
    except RepeatedKeyError as error:
        raise CoderFileError(f"{path} {error}") from None


def open_tensors(path: Path) -> LazyState:
    """The tensors of a safetensors file, mapped, none read yet."""
    try:
        return open_safetensors(plain_file(path))
    except CoderFileError:
        raise
    except CheckpointError as error:
        raise CoderFileError(str(error)) from None


def open_archive(path: Path) -> LazyState:
    """The tensors of a PyTorch archive, read without running what may be in it."""
    try:
        return open_bin(plain_file(path))
    except CoderFileError:
        raise
    except CheckpointError as error:
        raise CoderFileError(str(error)) from None


def file_metadata(path: Path) -> dict[str, str]:
    """The text entries of a safetensors file's header."""
    open_tensors(path)  # says what is wrong with a damaged file
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata() or {})


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def dtype_name(dtype: object, where: str = "dtype", among: Iterable[str] = tuple(DTYPES)) -> str:
    """ "float16" of "float16", "torch.float16" and torch.float16."""
    name = str(dtype).removeprefix("torch.")
    if name not in among:
        if name in STORED:
            way_out = f": {name} is a format of files alone; leave it out, or ask for float32"
        else:
            longer = next((one for one in among if one.startswith(name)), None)
            way_out = f"; nearest: {longer!r}" if longer else nearest(name, among)
        raise CoderFileError(f"{where} must be one of {', '.join(among)}, got {dtype!r}{way_out}")
    return name


def check_names(found: Iterable[str], expected: Iterable[str], where: Path) -> None:
    """The tensors there are, are those there should be."""
    found, expected = set(found), set(expected)
    if found == expected:
        return
    missing, extra = expected - found, found - expected
    parts = [f"missing {some(missing)}"] if missing else []
    if extra:
        odd = min(extra)
        parts.append(f"unexpected {some(map(repr, extra))}{nearest(odd, missing)}")
    raise CoderFileError(f"{where} does not hold this coder's tensors: {'; '.join(parts)}")


def check_tensors(
    tensors: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
    among: Mapping[str, torch.dtype] = DTYPES,
) -> None:
    """Names, shapes, number formats (one of `among`) and finiteness.

    Raises
    ------
    CoderFileError
        Naming the tensor, what it is and what it should be. Shapes are looked at before any number is.
    """
    check_names(tensors, shapes, where)
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CoderFileError(f"{name} in {where} has shape {list(tensor.shape)}, expected {list(shape)}")
        if tensor.dtype not in among.values():
            got = str(tensor.dtype).removeprefix("torch.")
            raise CoderFileError(f"{name} in {where} has dtype {got}, expected one of {', '.join(among)}")
    for name in shapes:
        flat = tensors[name].reshape(-1)
        bad = sum(not_finite(part) for part in flat.split(FINITE_AT_ONCE))
        if bad:
            raise CoderFileError(f"{name} in {where} has {bad:,} of {flat.numel():,} numbers that are not finite")


def not_finite(tensor: Tensor) -> int:
    """How many numbers are not finite; of float8, for which torch has no such question, as well."""
    return int((~(tensor.float() if tensor.itemsize == 1 else tensor).isfinite()).sum())


def field(config: Mapping[str, Any], name: str, kind: type, where: Path) -> Any:
    """A field that must be there and be an int, str, bool or dict; ints are positive."""
    if name not in config:
        near = nearest(name, config)
        raise CoderFileError(f"{where} lacks {name}{near}")
    value = config[name]
    if isinstance(value, str) and len(value) > TEXT:
        raise CoderFileError(f"{where} has a {name} of {len(value):,} characters, expected at most {TEXT}")
    right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if not right or (kind is int and value < 1):
        expected = {int: "a positive integer", str: "a text", bool: "true or false", dict: "an object"}[kind]
        raise CoderFileError(f"{where} has {name}={value!r}, expected {expected}")
    return value
