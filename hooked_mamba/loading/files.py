"""From a name to a folder, and from a folder to its tensors."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from hooked_mamba.loading.gguf.parts import all_parts, models_in
from hooked_mamba.loading.tables import CheckpointError, LazyState
from hooked_mamba.loading.tensor_files import open_bin, open_safetensors, open_sharded
from hooked_mamba.local_paths import means_local, missing

__all__ = ["bundled_names", "open_weights", "resolve"]

PRETRAINED = Path(__file__).parent.parent / "pretrained"
"""Checkpoints that come with the package, one folder each."""

CONFIG_PATTERNS = ["*.json", "tokenizer*", "*.model", "*.txt"]

# Looked for in this order; the first kind that is there is fetched, so that no checkpoint is fetched twice.
WEIGHT_PATTERNS = [["model*.safetensors"], ["consolidated*.safetensors"], ["pytorch_model*.bin"]]

LONE_FILES = (".pth", ".gguf")
"""Endings of files that hold a whole model."""

ADAPTER_PATTERNS = [["adapter_model.safetensors"], ["adapter_model.bin"]]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)/((?:\w[\w.-]*/)*\w[\w.-]*\.gguf)")
"""A GGUF file of a hub repository, which may hold the same weights many times in other precisions, each in a folder."""


def bundled_names() -> list[str]:
    """Names of the checkpoints that come with the package."""
    return sorted(path.parent.name for path in PRETRAINED.glob("*/config.json"))


def resolve(name_or_path: str | Path, revision: str | None = None) -> Path:
    """The folder of a checkpoint: a bundled name, a local folder (`.pth` or `.gguf` file), or a hub id, in this order.

    Parameters
    ----------
    name_or_path
        "tiny-name", "path/to/folder", "path/to/model.pth" (or .gguf), "owner/name" or "owner/name/file.gguf".
    revision
        Branch, tag or commit of a hub id.

    Raises
    ------
    CheckpointError
        Nothing of that name (of a path, with names near it), or a revision where there are none.
    OSError
        The hub cannot be reached, or does not let us have the checkpoint; the bundled names are listed.
    """
    name = str(name_or_path)
    folder = PRETRAINED / name if name in bundled_names() else Path(name_or_path).expanduser()
    if folder.is_dir() or (folder.is_file() and folder.suffix in LONE_FILES):
        if revision is not None:
            raise CheckpointError(f"{name!r} is local and has no revisions; leave revision= out")
        return folder
    if means_local(name_or_path) and not folder.exists():
        raise CheckpointError(missing(name_or_path))
    bundled = ", ".join(bundled_names()) or "none"
    one_file = None if isinstance(name_or_path, Path) else HUB_FILE.fullmatch(name)
    if one_file is not None:
        return _fetched(one_file[1], revision, lambda fetch: fetch([all_parts(one_file[2])])) / one_file[2]
    if isinstance(name_or_path, Path) or not HUB_ID.fullmatch(name):
        what = (
            "is a file; expected its folder, or a .pth or .gguf file"
            if folder.is_file()
            else "is neither an existing folder nor a hub id"
        )
        raise CheckpointError(f"{name!r} {what}. Checkpoints that come with the package: {bundled}")
    return _download(name, revision, WEIGHT_PATTERNS)


def adapter_folder(name_or_path: str | Path) -> Path:
    """The folder of an adapter: a local one, or a hub id.

    Raises
    ------
    CheckpointError
        Neither.
    OSError
        The hub cannot be reached.
    """
    folder, name = Path(name_or_path).expanduser(), str(name_or_path)
    if folder.is_dir():
        return folder
    if folder.is_file():
        raise CheckpointError(f"{name!r} is a file; expected the adapter's folder, {folder.parent}")
    if means_local(name_or_path):
        raise CheckpointError(f"adapter {missing(name_or_path)}")
    if not HUB_ID.fullmatch(name):
        raise CheckpointError(f"adapter {name!r} is neither an existing folder nor a hub id")
    return _download(name, None, ADAPTER_PATTERNS)


Fetch = Callable[[list[str]], Path]
"""Patterns of file names -> the folder with these files."""


def _download(repo_id: str, revision: str | None, kinds: list[list[str]]) -> Path:
    """A hub checkpoint's folder in the local cache, fetched if need be (never when HF_HUB_OFFLINE is set).

    Raises
    ------
    CheckpointError
        Nothing but several GGUF files; they are listed.
    OSError
        The hub cannot be reached.
    """

    def whole(fetch: Fetch) -> Path:
        folder = fetch(CONFIG_PATTERNS)
        for patterns in kinds:
            fetch(patterns)
            if any(path for pattern in patterns for path in folder.glob(pattern)):
                return folder
        names = models_in(_gguf_files(repo_id, revision)) if kinds is WEIGHT_PATTERNS else []
        if len(names) > 1:
            raise CheckpointError(
                f"{repo_id!r} holds several GGUF files: {', '.join(names)}; name one of them, as in"
                f" {f'{repo_id}/{names[0]}'!r}"
            )
        return (fetch([all_parts(names[0])]) / names[0]).parent if names else folder

    return _fetched(repo_id, revision, whole)


def _gguf_files(repo_id: str, revision: str | None) -> list[str]:
    """GGUF files of a hub repository; none where the hub does not tell."""
    from huggingface_hub import list_repo_files

    try:
        return sorted(name for name in list_repo_files(repo_id, revision=revision) if name.endswith(".gguf"))
    except Exception:  # what is in the local cache is then all there is
        return []


def _fetched(repo_id: str, revision: str | None, of: Callable[[Fetch], Path]) -> Path:
    """What `of` does with the hub's client, whose errors say what needs no network."""
    from huggingface_hub import snapshot_download

    def fetch(patterns: list[str]) -> Path:
        return Path(snapshot_download(repo_id, revision=revision, allow_patterns=patterns))

    try:
        return of(fetch)
    except CheckpointError:
        raise
    except Exception as error:  # the hub client's errors differ between its releases and its HTTP libraries
        at = f" at revision {revision!r}" if revision else ""
        reason = str(error).strip().splitlines()
        raise OSError(
            f"{repo_id!r}{at} is neither a bundled name nor a local folder, and fetching it from the hub failed "
            f"({type(error).__name__}: {reason[0] if reason else 'no message'}). "
            f"Checkpoints that need no network: {', '.join(bundled_names()) or 'none'}"
        ) from None


def open_weights(folder: Path, consolidated: bool = False) -> LazyState:
    """The tensors of a checkpoint folder, memory-mapped; safetensors before archives, whole before sharded.

    Parameters
    ----------
    folder
        Where the files are.
    consolidated
        Whether `consolidated.safetensors` is meant, where it is there (Mistral's format).

    Raises
    ------
    CheckpointError
        No weights, or damaged ones.
    """
    kinds: list[tuple[str, Callable[[Path], LazyState]]] = [
        ("model.safetensors", open_safetensors),
        ("model.safetensors.index.json", lambda path: open_sharded(path, open_safetensors, ".safetensors")),
        ("pytorch_model.bin", open_bin),
        ("pytorch_model.bin.index.json", lambda path: open_sharded(path, open_bin, ".bin")),
    ]
    if consolidated:
        kinds.insert(0, ("consolidated.safetensors", open_safetensors))
    for name, open_kind in kinds:
        if (folder / name).exists():
            return open_kind(folder / name)
    present = ", ".join(sorted(path.name for path in folder.iterdir())) or "nothing"
    raise CheckpointError(f"{folder} has no weights: expected {', '.join(name for name, _ in kinds)}; found {present}")
