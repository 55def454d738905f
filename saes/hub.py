"""Sharing coders: push, load, pull, list and search, in repositories of the hub and in folders alike.

A repository holds one folder per coder, an index (`index.json`) and a card (`README.md`). One push is one commit.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from hooked_mamba.durable import write_file
from hooked_mamba.local_paths import means_local, missing
from saes.cards import MARK, model_card
from saes.coder import SparseCoder
from saes.files import CoderFileError, open_coder, save
from saes.files.checks import read_object
from saes.files.own import stored_dtype
from saes.files.save import CONFIG, WEIGHTS, write_files
from saes.find import PRETRAINED, HubError, endpoint, is_local, resolve, snapshot, what_failed
from saes.naming import full_name
from saes.registry import INDEX, Entry, check_name, index_bytes, read_index, scan, search_entries

CARD = "README.md"

TRIES = 5
"""Pushes to one repository at the same time: how often to retry on top of the other's commit."""

Coders = SparseCoder | Iterable[SparseCoder] | Mapping[str, SparseCoder | str | Path]
"""One, several under names made from their configs, or by name; a path stands for a coder on disk."""


def load(source: str | Path, name: str | None = None, revision: str | None = None, **options: Any) -> SparseCoder:
    """A coder of a repository or folder; see :meth:`saes.SparseCoder.from_pretrained`."""
    return SparseCoder.from_pretrained(source, name, revision, **options)


def pull(source: str | Path, folder: str | Path, name: str | None = None, revision: str | None = None) -> Path:
    """Copy a coder into its own folder, checked, and converted to our format.

    Returns
    -------
    Path
        The folder.
    """
    path, folder = resolve(source, name, revision), Path(folder).expanduser()
    coder = SparseCoder.load(path)
    if open_coder(path).format == "hooked_mamba":
        write_files(folder, {file: (path / file).read_bytes() for file in (WEIGHTS, CONFIG)})
        return folder
    return save(coder, folder)


def list_coders(source: str | Path | None = None, revision: str | None = None, token: str | None = None) -> list[Entry]:
    """What a repository or folder holds, by its index; None: the coders that come with the package.

    Raises
    ------
    CoderFileError
        If there is no index, or a damaged one. A local folder without one is looked through.
    """
    if source is None or is_local(source):
        folder = PRETRAINED if source is None else Path(source).expanduser()
        if source is not None and not folder.is_dir():
            path = means_local(source) and not Path(source).expanduser().exists()
            said = missing(source) if path else f"{str(source)!r} is neither a folder nor a hub id (owner/name)"
            raise CoderFileError(said)
        if revision is not None:
            raise CoderFileError(f"{str(source)!r} is on this machine and has no revisions; leave revision= out")
        entries = None if source is None else read_index(folder)
        return list((scan(folder) if entries is None else entries).values())
    entries = read_index(snapshot(str(source), [INDEX], revision, token))
    if entries is None:
        raise CoderFileError(f"{source!r} has no {INDEX}; its coders load by the names of their folders")
    return list(entries.values())


def search(
    query: str = "", source: str | Path | None = None, revision: str | None = None, **wanted: Any
) -> list[Entry]:
    """Coders of a repository, a folder or the package by words and fields; see :func:`saes.registry.search_entries`."""
    return search_entries(list_coders(source, revision), query, **wanted)


def push(
    coders: Coders,
    to: str | Path,
    *,
    metrics: Mapping[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    license: str = "mit",
    revision: str | None = None,
    private: bool = False,
    token: str | None = None,
) -> str:
    """Add coders to a repository of the hub or to a folder, and write its index and card.

    Coders of the same names are replaced; everything else stays. On the hub it is one commit, retried if someone
    else's comes between.

    Parameters
    ----------
    coders
        One coder, several, or a mapping from names to coders or to their folders.
    to
        "owner/name" on the hub, created if needed, or a folder: a Path, an existing folder, or a text that cannot be a
        hub id, such as "./coders".
    metrics
        Numbers by name of a single coder; of several, such mappings by the coders' names.
    dtype
        On disk, as in :func:`saes.files.save`. Coders given by their folders keep what they have.
    license
        The hub's name for the weights' licence.
    revision
        Branch; created if needed. None: main.
    private
        Whether a repository that is made can be seen by its owner only.
    token
        None: the one that the hub's client keeps.

    Returns
    -------
    str
        The commit's address, or the folder.

    Raises
    ------
    CoderFileError
        For coders that are damaged, names that are none, or metrics that belong to no coder here.
    HubError
        What the hub's client reports.
    """
    local = is_local(to)
    if local and revision is not None:
        raise CoderFileError(f"{str(to)!r} is on this machine and has no revisions; leave revision= out")
    with tempfile.TemporaryDirectory() as scratch:
        staged = _stage(coders, Path(scratch), metrics, dtype)
        if local:
            return _to_folder(Path(to).expanduser(), Path(scratch), staged, license)
        return _to_hub(str(to), Path(scratch), staged, license, revision, private, token)


def load_sae(repo_id: str, filename: str | None = None, revision: str | None = None, **options: Any) -> SparseCoder:
    """:func:`load` under recurrentlens' name; reads that library's files too, a TopK's with `k=`."""
    return load(repo_id, filename, revision, **options)


def push_sae(sae: SparseCoder, repo_id: str, name: str | None = None, private: bool = False) -> str:
    """:func:`push` of one coder under recurrentlens' name."""
    return push(sae if name is None else {name: sae}, repo_id, private=private)


def _stage(
    coders: Coders, scratch: Path, metrics: Mapping[str, Any] | None, dtype: str | torch.dtype | None
) -> dict[str, Entry]:
    """Save all into a scratch folder, and say what was saved."""
    named = _named(coders)
    single = len(named) == 1 and not (metrics and all(isinstance(value, Mapping) for value in metrics.values()))
    given = {next(iter(named)): metrics or {}} if single else dict(metrics or {})
    for name in given:
        if name not in named:
            raise CoderFileError(f"metrics of {name!r}, which is not pushed; expected {', '.join(sorted(named))}")
    staged: dict[str, Entry] = {}
    for name, coder in named.items():
        if isinstance(coder, SparseCoder):
            save(coder, scratch / name, dtype=dtype, metrics=given.get(name))
        else:
            opened, loaded = open_coder(coder), SparseCoder.load(coder)
            own = opened.format == "hooked_mamba"
            kept = _dtype_of(Path(coder)) if own and dtype is None else dtype
            mine = given.get(name, {})
            training = {k: v for k, v in opened.training.items() if k != "metrics_from" or not mine}
            save(loaded, scratch / name, dtype=kept, metrics={**opened.metrics, **mine}, training=training)
        saved = open_coder(scratch / name)
        staged[name] = Entry.of(name, saved.cfg, saved.metrics, saved.training)
    return staged


def _dtype_of(folder: Path) -> str:
    return stored_dtype(read_object(folder / CONFIG), folder / CONFIG)


def _named(coders: Coders) -> dict[str, SparseCoder | str | Path]:
    if isinstance(coders, Mapping):
        named = dict(coders)
    else:
        several = [coders] if isinstance(coders, SparseCoder) else list(coders)
        named = {}
        for coder in several:
            name = full_name(coder.cfg)
            if name in named:
                raise CoderFileError(f"two of the coders would be called {name!r}; give a mapping from names to coders")
            named[name] = coder
    if not named:
        raise CoderFileError("there are no coders to push")
    for name in named:
        check_name(name)
        if name in (INDEX, CARD) or any(other.startswith(f"{name}/") for other in named):
            raise CoderFileError(f"a coder cannot be called {name!r}: another file or coder lies there")
    return named


def _merged(old: Mapping[str, Entry] | None, new: Mapping[str, Entry]) -> list[Entry]:
    return list({**(old or {}), **new}.values())


def _to_folder(folder: Path, scratch: Path, staged: Mapping[str, Entry], license: str) -> str:
    if folder.exists() and not folder.is_dir():
        raise CoderFileError(f"{folder} is a file; expected a folder")
    entries = _merged(read_index(folder) if folder.exists() else None, staged)
    for name in staged:
        write_files(folder / name, {file: (scratch / name / file).read_bytes() for file in (WEIGHTS, CONFIG)})
    write_file(folder / INDEX, index_bytes(entries))
    card = folder / CARD
    if not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace"):
        write_file(card, model_card(entries, repo=folder.name, license=license).encode())
    return str(folder)


def _to_hub(
    repo: str,
    scratch: Path,
    staged: Mapping[str, Entry],
    license: str,
    revision: str | None,
    private: bool,
    token: str | None,
) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(endpoint=endpoint(), token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        for attempt in range(TRIES):
            head = api.model_info(repo, revision=revision)
            there = {file.rfilename for file in head.siblings or []} & {INDEX, CARD}
            root = snapshot(repo, sorted(there), head.sha, token) if there else scratch
            entries = _merged(read_index(root), staged)
            files: dict[str, Path | bytes] = {
                f"{name}/{file}": scratch / name / file for name in staged for file in (CONFIG, WEIGHTS)
            }
            files[INDEX] = index_bytes(entries)
            card = root / CARD
            if not card.exists() or MARK in card.read_text(encoding="utf-8", errors="replace"):
                files[CARD] = model_card(entries, repo=repo, license=license).encode()
            try:
                done = api.create_commit(
                    repo,
                    [CommitOperationAdd(path, source) for path, source in files.items()],
                    commit_message=f"Add {', '.join(sorted(staged))}"[:120],
                    revision=revision,
                    parent_commit=head.sha,
                )
            except Exception as error:  # 412: someone else's commit came between
                status = getattr(getattr(error, "response", None), "status_code", None)
                if status != 412 or attempt == TRIES - 1:
                    raise
            else:
                return str(done.commit_url)
    except (CoderFileError, HubError):
        raise
    except Exception as error:  # the client's errors differ between its releases and its HTTP libraries
        raise HubError(what_failed(f"pushing to {repo!r}", error)) from None
    raise AssertionError("the loop above returns or raises")
