"""Names that can only mean a file or a folder on this machine, and what is near one that is not there."""

from __future__ import annotations

import difflib
from pathlib import Path

WEIGHTS = (".gguf", ".safetensors", ".pth", ".pt", ".bin")
"""Endings of files with weights."""

SHOWN = 5
"""Names that a message lists."""


def means_local(name: str | Path) -> bool:
    """Whether a name is a path and no hub id: a Path, one that starts with ".", "/" or "~", or a file with weights.

    "owner/model.gguf" may be a repository; it is a path where there is a folder "owner".
    """
    text = str(name)
    if isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text:
        return True
    first, *rest = text.split("/")
    return text.endswith(WEIGHTS) and (not rest or Path(first).is_dir())


def missing(path: str | Path) -> str:
    """That a path does not exist, and the names in its folder that are near it, or of its kind."""
    place = _first_missing(path)
    above = "" if place == Path(path).expanduser() else f": there is no folder {place}"
    return f"{str(path)!r} does not exist{above}{near_paths(path)}"


def _first_missing(path: str | Path) -> Path:
    place = Path(path).expanduser()
    while not place.parent.is_dir() and place.parent != place:
        place = place.parent
    return place


def near_paths(path: str | Path) -> str:
    """Part of a message: the names that :func:`missing` lists."""
    place = _first_missing(path)
    folder = place.parent
    try:
        names = sorted(f"{one.name}/" if one.is_dir() else one.name for one in folder.iterdir() if one.name[0] != ".")
    except OSError:
        return ""
    stems = {name.removesuffix(place.suffix or "/"): name for name in names}
    near = [stems[stem] for stem in difflib.get_close_matches(place.stem, stems, n=SHOWN, cutoff=0.6)]
    shown = near or [name for name in names if place.suffix and name.endswith(place.suffix)][:SHOWN]
    return f"; {'near it' if near else 'of its kind'} in {folder.resolve()}: {', '.join(shown)}" if shown else ""
