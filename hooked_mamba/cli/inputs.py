"""What a command is given, looked at before anything that takes long."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from hooked_mamba.local_paths import means_local, missing

Paths = Mapping[str, str | Path | None]
"""Flag -> its path; None: not given."""


def check_inputs(
    *,
    reads: Paths | None = None,
    writes: Paths | None = None,
    folders: Paths | None = None,
    model: str | None = None,
    device: str | None = None,
) -> None:
    """Refuse what cannot work, before a model is loaded.

    Parameters
    ----------
    reads
        Files that must be there.
    writes
        Files that will be written: no folders, and nothing on the way to them is a file.
    folders
        Folders that will be written into.
    model
        A path must lead to something. Names of the hub are not asked for here.
    device
        Must be one of this machine.

    Raises
    ------
    OSError
        A path that is not what it must be.
    ValueError
        A device that is not there.
    """
    for flag, path in _given(reads):
        if not path.exists():
            raise FileNotFoundError(f"{flag}: {missing(path)}")
        if path.is_dir():
            raise IsADirectoryError(f"{flag}: {path} is a folder; expected a file")
    for flag, path in _given(writes):
        if path.is_dir():
            raise IsADirectoryError(f"{flag}: {path} is a folder; name the file to write in it")
        _check_way(flag, path.parent)
    for flag, path in _given(folders):
        _check_way(flag, path)
    if model is not None and means_local(model) and not Path(model).expanduser().exists():
        raise FileNotFoundError(f"--model: {missing(model)}")
    if device is not None and device != "cpu":
        _check_device(device)


def _given(paths: Paths | None) -> list[tuple[str, Path]]:
    return [(flag, Path(path).expanduser()) for flag, path in (paths or {}).items() if path is not None]


def _check_way(flag: str, folder: Path) -> None:
    for place in (folder, *folder.parents):
        if place.is_dir():
            return
        if place.exists():
            raise NotADirectoryError(f"{flag}: {place} is a file; expected a folder")


def _check_device(device: str) -> None:
    import torch

    try:
        found = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device {device} is no device of torch; expected cpu or cuda") from None
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here")
