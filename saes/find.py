"""From a name to a coder's folder: bundled with the package, on this machine, or on the hub."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from hooked_mamba.local_paths import means_local, missing
from saes.files import CoderFileError
from saes.files.checks import nearest
from saes.files.load import SINGLE
from saes.files.save import CONFIG, WEIGHTS
from saes.registry import INDEX, check_name, one_of, read_index, scan

PRETRAINED = Path(__file__).parent / "pretrained"
"""Coders that come with the package."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

FILES = (CONFIG, WEIGHTS, SINGLE)
"""The only files of a coder that are fetched."""


class HubError(OSError):
    """The hub cannot be reached, or does not have or give what was asked."""


def bundled_names() -> list[str]:
    """Names of the coders that come with the package."""
    return sorted(path.parent.relative_to(PRETRAINED).as_posix() for path in PRETRAINED.rglob(CONFIG))


def endpoint() -> str | None:
    """The hub's address as the environment names it now, not when the client was imported."""
    return os.environ.get("HF_ENDPOINT") or None


def is_local(where: str | Path) -> bool:
    """Whether a place means a folder: a Path, an existing folder, or a text that cannot be a hub id."""
    if isinstance(where, Path) or Path(where).expanduser().exists():
        return True
    return not HUB_ID.fullmatch(where)


def resolve(
    name: str | Path, subfolder: str | None = None, revision: str | None = None, token: str | None = None
) -> Path:
    """The folder (or single file) of a coder: bundled, local, or fetched from the hub; looked for in this order.

    Parameters
    ----------
    name
        "tinystories-4l/l1-mambacoder", "path/to/folder", "owner/name" or "owner/name/folder/in/it".
    subfolder
        The coder in a repository or folder of several; not needed where there is only one.
    revision
        Branch, tag or commit of a hub repository.
    token
        For a private one; None: the one that the hub's client keeps.

    Raises
    ------
    CoderFileError
        Nothing has that name (the nearest is suggested), or several coders do.
    HubError
        The hub cannot be reached, or has no such repository or revision.
    """
    if subfolder is not None:
        check_name(subfolder)
    bundled = bundled_names()
    full = f"{name}/{subfolder}" if subfolder is not None else str(name)
    if not isinstance(name, Path) and full in bundled:
        _no_revision(full, revision, "comes with the package")
        return PRETRAINED / full
    path = Path(name).expanduser()
    if path.exists():
        _no_revision(str(name), revision, "is on this machine")
        return _within(path, subfolder)
    if means_local(name):
        raise CoderFileError(f"{missing(name)}")
    families = {known.split("/")[0] for known in bundled}
    parts = str(name).split("/")
    if parts[0] in families or not HUB_ID.fullmatch("/".join(parts[:2])):
        raise CoderFileError(f"{full!r} is not a bundled coder, a folder or a hub id{_known(full, bundled)}")
    if parts[2:]:
        if subfolder is not None:
            raise CoderFileError(
                f"{name!r} names a folder in the repository already; leave subfolder={subfolder!r} out"
            )
        subfolder = check_name("/".join(parts[2:]))
    return fetch("/".join(parts[:2]), subfolder, revision, token)


def _known(name: str, bundled: list[str]) -> str:
    """Part of a message: bundled coders of the model that a name begins with, or near it, and what lists all."""
    family = name.split("/")[0]
    there = [known for known in bundled if known.startswith(f"{family}/")]
    near = there or difflib.get_close_matches(name, bundled, n=3, cutoff=0.6)
    said = "" if not near else f"; {f'of {family} there are' if there else 'near it are'} {', '.join(near)}"
    return f"{said}; of the bundled ones, which need no network, `hooked-mamba sae list` lists all"


def _no_revision(name: str, revision: str | None, why: str) -> None:
    if revision is not None:
        raise CoderFileError(f"{name!r} {why} and has no revisions; leave revision= out, got {revision!r}")


def _within(folder: Path, subfolder: str | None) -> Path:
    """The coder meant in a local folder, which may be one itself."""
    if subfolder is None:
        if folder.is_file() or any((folder / file).exists() for file in FILES):
            return folder
        entries = read_index(folder)
        return folder / one_of(entries, str(folder / INDEX)) if entries is not None else folder
    inner = folder / subfolder
    if not inner.exists() and (folder / "coders" / subfolder).exists():  # the folder of a training
        return folder / "coders" / subfolder
    if not inner.exists():
        names = sorted(scan(folder))
        there = ", ".join(names) or "no coders"
        raise CoderFileError(f"{folder} has no {subfolder!r}{nearest(subfolder, names)}; it has {there}")
    return inner


def fetch(repo_id: str, subfolder: str | None = None, revision: str | None = None, token: str | None = None) -> Path:
    """A hub coder's folder in the client's cache, all files of one commit; fetched unless it is there."""
    if subfolder is None:
        root = snapshot(repo_id, [INDEX, *FILES], revision, token)
        if any((root / file).exists() for file in FILES):
            return root
        entries = read_index(root)
        if entries is None:
            raise CoderFileError(
                f"{repo_id!r} has no coder at its root and no {INDEX}; name its folder in the repository"
            )
        subfolder, revision = one_of(entries, repo_id), root.name  # the same commit
    wanted = [subfolder] if subfolder.endswith((".safetensors", ".pt")) else [f"{subfolder}/{file}" for file in FILES]
    root = snapshot(repo_id, [INDEX, *wanted], revision, token)
    if any((root / file).exists() for file in wanted):
        return root / subfolder
    names = sorted(read_index(root) or {})
    there = f"; its {INDEX} lists {', '.join(names[:20])}" if names else ""
    raise CoderFileError(f"{repo_id!r} has no coder {subfolder!r}{nearest(subfolder, names)}{there}")


def snapshot(repo_id: str, files: list[str], revision: str | None = None, token: str | None = None) -> Path:
    """Those of these files that one commit has, in the hub client's cache.

    Raises
    ------
    HubError
        With the client's reason.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=files, token=token, endpoint=endpoint())
        )
    except Exception as error:  # the client's errors differ between its releases and its HTTP libraries
        doing = f"fetching {repo_id!r}{f' at {revision!r}' if revision else ''}"
        raise HubError(f"{what_failed(doing, error)}{_known(repo_id, bundled_names())}") from None


def what_failed(doing: str, error: BaseException) -> str:
    """One line with the hub client's error and its cause."""
    said = [_line(error)]
    while error.__cause__ is not None:
        error = error.__cause__
    said += [line for line in [_line(error)] if line not in said]
    return f"{doing} failed ({'; '.join(said)})"


def _line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
