"""Reading and writing story files: plain UTF-8, stories parted by a line `<|endoftext|>`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

END = "<|endoftext|>"


def read_stories(path: Path | str) -> list[str]:
    """The stories of a text file. A file without the separator is one long story.

    Raises
    ------
    ValueError
        If the file holds no text.
    """
    stories = [story.strip() for story in Path(path).read_text(encoding="utf-8").split(END)]
    stories = [story for story in stories if story]
    if not stories:
        raise ValueError(f"{path} holds no text: expected stories parted by lines {END!r}")
    return stories


def write_stories(path: Path | str, stories: Iterable[str]) -> None:
    """Write stories as :func:`read_stories` reads them."""
    Path(path).write_text("".join(f"{story}\n{END}\n" for story in stories), encoding="utf-8")


def digest(stories: Iterable[str]) -> str:
    """Fingerprint of a text, so that a resumed run can tell that it reads the same one."""
    sha = hashlib.sha256()
    for story in stories:
        sha.update(story.encode() + b"\0")
    return sha.hexdigest()[:16]
