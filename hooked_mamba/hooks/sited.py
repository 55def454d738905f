"""Modules that declare their hook sites, and the walk over them in order of computation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn

from hooked_mamba.hooks.points import HookPoint, LazyHookPoint, StateHookPoint
from hooked_mamba.hooks.site import Child, Kind, PlacedSite, Site

POINTS: dict[Kind, type[HookPoint]] = {"point": HookPoint, "lazy": LazyHookPoint, "state": StateHookPoint}


class SitedModule(nn.Module):
    """A module with hook sites: `sites` lists them, and the submodules between them, in order of computation.

    `add_sites()`, called in `__init__`, creates a hook point for every row. A subclass whose instances differ in what
    they have overrides :meth:`site_rows`.
    """

    place: ClassVar[str | None] = None
    """Where it stands: its name in a block ("mixer"), "" for the model, "block" for a block; None for what only ever
    stands inside of others (norms)."""
    sites: ClassVar[tuple[Site | Child, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.place is not None and "sites" in cls.__dict__:
            DECLARED.append(cls)

    if TYPE_CHECKING:  # hook points are made from rows: a type checker cannot know them

        def __getattr__(self, name: str) -> Any: ...

    def site_rows(self) -> tuple[Site | Child, ...]:
        """The rows of this instance."""
        return type(self).sites

    def sizes(self) -> Mapping[str, int]:
        """Sizes of the symbols in its rows' shapes, b and l apart."""
        return {}

    def add_sites(self) -> None:
        """A hook point for every row."""
        for row in self.site_rows():
            if isinstance(row, Site):
                setattr(self, row.name, POINTS[row.kind]())
                # As a plain attribute too, which is found at once: torch looks for modules only when all else fails.
                self.__dict__[row.name] = self._modules[row.name]


DECLARED: list[type[SitedModule]] = []
"""Every class with a place of its own, in the order of definition."""


def placed_sites(module: SitedModule, prefix: str = "") -> Iterator[PlacedSite]:
    """Every site of a module and its submodules, in order of computation."""
    sizes = module.sizes()
    for row in module.site_rows():
        if isinstance(row, Site):
            yield PlacedSite(prefix + row.name, row, sizes)
            continue
        child = getattr(module, row.name, None)
        if isinstance(child, nn.ModuleList):
            for i, one in enumerate(child):
                yield from placed_sites(one, f"{prefix}{row.name}.{i}.")  # type: ignore[arg-type]
        elif child is not None:
            symbols = {ours: size for theirs, ours in row.symbols.items() if (size := child.sizes().get(theirs))}
            for site in placed_sites(child, f"{prefix}{row.name}."):
                yield PlacedSite(site.name, row.here(site.row), {**site.sizes, **symbols})


def placed_aliases(module: SitedModule, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Pairs (a full name used elsewhere, ours) for a module, which stands at `prefix`, and those inside it."""
    block = prefix[: prefix.rstrip(".").rfind(".") + 1]
    for row in module.site_rows():
        if isinstance(row, Site):
            for name in row.also:
                yield block + name, prefix + row.name
                if name != row.name:
                    yield prefix + name, prefix + row.name
            continue
        child = getattr(module, row.name, None)
        if isinstance(child, nn.ModuleList):
            for i, one in enumerate(child):
                yield from placed_aliases(one, f"{prefix}{row.name}.{i}.")  # type: ignore[arg-type]
        elif child is not None:
            for name, hook in row.also.items():
                yield prefix + name, f"{prefix}{row.name}.{hook}"
            for called in row.called:
                for site in placed_sites(child):
                    yield f"{prefix}{called}.{site.name}", f"{prefix}{row.name}.{site.name}"
            yield from placed_aliases(child, f"{prefix}{row.name}.")


def rows_of(cls: type, prefix: str = "") -> Iterator[tuple[str, Site]]:
    """(name within the module, row) for a class, those inside it included, without building one."""
    for row in cls.sites:  # type: ignore[attr-defined]
        if isinstance(row, Site):
            yield prefix + row.name, row
        elif row.module is not None:
            yield from ((name, row.here(site)) for name, site in rows_of(row.module, f"{prefix}{row.name}."))


def aliases_of(cls: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(name used elsewhere, name within the block) for a class that stands at `prefix` in a block."""
    for row in cls.sites:  # type: ignore[attr-defined]
        if isinstance(row, Site):
            yield from ((name, prefix + row.name) for name in row.also)
        elif row.module is not None:
            yield from ((name, f"{prefix}{row.name}.{hook}") for name, hook in row.also.items())
            for called in row.called:
                yield from (
                    (f"{prefix}{called}.{name}", f"{prefix}{row.name}.{name}") for name, _ in rows_of(row.module)
                )
            yield from aliases_of(row.module, f"{prefix}{row.name}.")
