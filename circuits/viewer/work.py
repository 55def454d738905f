"""Work done on a graph's page, read back: names and supernodes from the file that "save work" writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from circuits.graph import Graph
from circuits.viewer.page import node_id

FORMAT = "hooked-mamba circuit work"
VERSION = 1


def with_work(graph: Graph, path: str | Path) -> Graph:
    """A graph with the names and supernodes of a file that its page saved.

    Parameters
    ----------
    graph
        The page's graph, or another one with the same nodes among its own.
    path
        The file; pins are the page's own concern and stay there.

    Raises
    ------
    ValueError
        The file is not saved work, or names nodes that this graph does not have.
    """
    path = Path(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f'{path} is not saved work of a graph\'s page: expected "format": "{FORMAT}"')
    if found.get("version") != VERSION:
        raise ValueError(f"{path} has version {found.get('version')!r}, expected {VERSION}")
    number = {node_id(node): i for i, node in enumerate(graph.nodes)}
    names, groups = found.get("names", {}), found.get("groups", [])
    if not _all_texts(names) or not isinstance(groups, list) or not all(map(_is_group, groups)):
        raise ValueError(f"{path}: names must map nodes to texts, and groups have a name and members")
    unknown = [
        key for key in [*names, *(member for group in groups for member in group["members"])] if key not in number
    ]
    if unknown:
        raise ValueError(f"{path} names {len(unknown)} nodes that this graph does not have, such as {unknown[0]!r:.80}")
    graph = graph.renamed({number[key]: name for key, name in names.items()})
    for n, group in enumerate(groups):
        name = group["name"] or f"supernode {n + 1}"
        graph = graph.with_supernode(name, [number[member] for member in group["members"]])
    return graph


def _all_texts(names: Any) -> bool:
    return isinstance(names, dict) and all(isinstance(name, str) for name in names.values())


def _is_group(group: Any) -> bool:
    if not isinstance(group, dict) or not isinstance(group.get("name"), str):
        return False
    members = group.get("members")
    return isinstance(members, list) and all(isinstance(member, str) for member in members)
