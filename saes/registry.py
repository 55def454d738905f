"""The index of a repository or folder of coders: `index.json`, one entry per coder, read without trusting it."""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from hooked_mamba.hooks.names import unalias
from hooked_mamba.names_elsewhere import SAE_LENS, import_advice
from saes.config import ARCHITECTURES, ONLY_READ, CoderConfig
from saes.files import CoderFileError, Opened, open_coder
from saes.files.checks import nearest, read_object
from saes.files.own import Metrics, Training, clean_metrics, clean_training
from saes.renamed import renamed_in
from saes.saelens_names import TOP

INDEX = "index.json"
FORMAT = 1
KINDS = ("sae", "mambacoder")

_PART = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_-])?")
NAME_LENGTH = 200


def check_name(name: str) -> str:
    """`name`, if it is a coder's place in a repository: a relative path of plain folder names.

    Raises
    ------
    CoderFileError
        For paths that lead elsewhere, and names that not every system can have.
    """
    parts = name.split("/") if isinstance(name, str) else []
    if not parts or len(name) > NAME_LENGTH or not all(_PART.fullmatch(part) for part in parts):
        raise CoderFileError(
            f"{name!r} is not a valid coder name; expected letters, digits, '.', '_' and '-', and '/' between folders"
        )
    return name


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A registry's entry for one coder."""

    name: str
    """Its folder in the repository."""
    kind: str
    """"sae" or "mambacoder"."""
    architecture: str
    site: str
    """The hook site that it reads."""
    out_site: str
    """The one that it predicts."""
    d_in: int
    d_out: int
    d_sae: int
    k: int | None = None
    skip: bool = False
    target: str | None = None
    window: int = 1
    """Positions that it reads."""
    layer: int | None = None
    model: str | None = None
    model_hash: str | None = None
    metrics: Metrics = field(default_factory=dict)
    training: Training = field(default_factory=dict)
    """What it was trained on."""

    @classmethod
    def of(
        cls,
        name: str,
        cfg: CoderConfig,
        metrics: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> Entry:
        """The entry of a coder under a name."""
        same = ("kind", "architecture", "out_site", "d_in", "d_out", "d_sae", "k", "skip", "target", "window", "layer")
        return cls(
            name=check_name(name),
            site=cfg.in_site,
            model=cfg.model_name,
            model_hash=cfg.model_hash,
            metrics=clean_metrics(metrics or {}),
            training=clean_training(training or {}),
            **{key: getattr(cfg, key) for key in same},
        )

    @classmethod
    def from_dict(cls, values: object, where: Path) -> Entry:
        """An entry as it is in a file, every field's type checked; fields of later versions are left out."""
        if not isinstance(values, dict):
            raise CoderFileError(f"{where} lists {values!r}; expected an object a coder")
        types = {row.name: str(row.type) for row in fields(cls)}
        optional = {n for n, t in types.items() if "None" in t or n in ("skip", "window", "metrics", "training")}
        missing = [n for n in types if n not in values and n not in optional]
        if missing:
            raise CoderFileError(f"an entry of {where} lacks {', '.join(missing)}{nearest(missing[0], values)}")
        known = {name: value for name, value in values.items() if name in types}
        kinds: dict[str, tuple[type, ...]] = {
            "str": (str,), "int": (int,), "bool": (bool,), "Metrics": (dict,), "Training": (dict,),
            "str | None": (str, type(None)), "int | None": (int, type(None)),
        }  # fmt: skip
        for name, value in known.items():
            right = kinds[types[name]]
            if not isinstance(value, right) or (isinstance(value, bool) and bool not in right):
                raise CoderFileError(f"an entry of {where} has {name}={value!r}, expected {types[name]}")
        check_name(known["name"])
        cleaned = {
            "metrics": clean_metrics(known.get("metrics", {})),
            "training": clean_training(known.get("training", {})),
        }
        return cls(**{**known, **cleaned})

    def text(self) -> str:
        """What a search looks in."""
        parts = (self.name, self.kind, self.architecture, self.site, self.out_site, self.model or "")
        return " ".join(parts).lower()


def read_index(folder: Path) -> dict[str, Entry] | None:
    """The entries of a folder's index by name; None if it has none.

    Raises
    ------
    CoderFileError
        For an index that is damaged, or of a later format.
    """
    path = folder / INDEX
    if not path.exists() and not path.is_symlink():
        return None
    values = read_object(path)
    if values.get("format") != FORMAT:
        raise CoderFileError(f"{path} is of format {values.get('format')!r}; this version reads format {FORMAT}")
    listed = values.get("coders")
    if not isinstance(listed, list):
        raise CoderFileError(f"{path} has coders={listed!r}, expected a list")
    entries = [Entry.from_dict(value, path) for value in listed]
    names = [entry.name for entry in entries]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise CoderFileError(f"{path} lists {twice!r} more than once")
    return {entry.name: entry for entry in entries}


def index_bytes(entries: Iterable[Entry]) -> bytes:
    """The file of an index, its entries in the order of their names."""
    listed = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.name)]
    return (json.dumps({"format": FORMAT, "coders": listed}, indent=2, allow_nan=False) + "\n").encode()


def scan(folder: Path) -> dict[str, Entry]:
    """Entries of all coders in a folder, read from their own configs; other folders are skipped."""
    found: dict[str, Entry] = {}
    for path in sorted(folder.rglob("cfg.json")):
        name = path.parent.relative_to(folder).as_posix()
        if name != "." and all(_PART.fullmatch(part) for part in name.split("/")):
            opened: Opened = open_coder(path.parent)
            found[name] = Entry.of(name, opened.cfg, opened.metrics, opened.training)
    return found


FILTERS = ("kind", "architecture", "site", "out_site", "layer", "d_sae", "model")


def search_entries(entries: Iterable[Entry], query: str = "", **wanted: Any) -> list[Entry]:
    """Entries in which all words of `query` occur and whose fields are as wanted.

    Parameters
    ----------
    query
        Words to find in name, kind, architecture, sites and model; upper and lower case are the same.
    wanted
        kind, architecture, layer, d_sae: equal. site, out_site: equal, or a pattern such as "*.hook_resid_post".
        model: a part of its name.
    """
    for name in wanted:
        if name not in FILTERS:
            raise TypeError(f"coders are not searched by {name!r}, but by {', '.join(FILTERS)}{nearest(name, FILTERS)}")
    architecture = wanted.get("architecture")
    known = (*ARCHITECTURES, *ONLY_READ)
    if architecture is not None and architecture not in known:
        near = nearest(architecture, known)
        raise ValueError(f"architecture must be one of {', '.join(known)}, got {architecture!r}{near}")
    if wanted.get("kind") not in (None, *KINDS):
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {wanted['kind']!r}{nearest(wanted['kind'], KINDS)}")
    words = query.lower().split()
    return [
        entry
        for entry in entries
        if all(word in entry.text() for word in words)
        and all(_fits(getattr(entry, name), name, value) for name, value in wanted.items() if value is not None)
    ]


def _fits(value: Any, name: str, wanted: Any) -> bool:
    if name == "model":
        return value is not None and str(wanted).lower() in value.lower()
    if name in ("site", "out_site"):
        return fnmatch.fnmatchcase(value, unalias(str(wanted)))
    return value == wanted


def one_of(entries: Mapping[str, Entry] | Sequence[str], where: str) -> str:
    """The name of the only coder there.

    Raises
    ------
    CoderFileError
        If there are several, which it lists, or none.
    """
    names = sorted(entries)
    if len(names) == 1:
        return names[0]
    if not names:
        raise CoderFileError(f"{where} lists no coders")
    more = f" and {len(names) - 20} more" if names[20:] else ""
    raise CoderFileError(f"{where} has {len(names)} coders; name one of {', '.join(names[:20])}{more}")


_renamed = renamed_in(__name__, {"default_name": "saes.naming.full_name"})
__getattr__ = import_advice(__name__, TOP, _renamed, SAE_LENS)
