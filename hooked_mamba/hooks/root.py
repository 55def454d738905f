"""Running a module with hooks and a cache: the interface TransformerLens users know."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hooked_mamba.hooks.cache import HookCache
from hooked_mamba.hooks.names import (
    OF_ATTENTION,
    NamesFilter,
    get_act_name,
    match_names,
    names_its_branch,
    unalias,
    unknown_name,
)
from hooked_mamba.hooks.points import Hook, HookFunction, HookPoint, LazyHookPoint, Reader, StateHookPoint
from hooked_mamba.hooks.positions import PositionSelect, PosSlice
from hooked_mamba.hooks.site import PlacedSite
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.hooks.sited import SitedModule, placed_aliases, placed_sites
from hooked_mamba.names_elsewhere import SAE_LENS, advice
from hooked_mamba.transformerlens_names import GRANTED, MODEL, OPTIONS, SAELENS_MODEL

HookList = Sequence[tuple[str | Sequence[str] | Callable[[str], bool], HookFunction]]
"""Pairs of (name, glob, list of these or predicate on names; function)."""


class HookedRoot(SitedModule):
    """A module whose hook points are found by name. Call :meth:`setup` at the end of `__init__`."""

    cache_class: ClassVar[type[HookCache]] = HookCache
    """What :meth:`run_with_cache` returns; a model's own knows what its sites mean."""

    def setup(self) -> None:
        """Name every hook point by its place in the module tree; declared ones are in order of computation."""
        self.context_level = 0
        points = {name: module for name, module in self.named_modules() if isinstance(module, HookPoint)}
        for name, point in points.items():
            point.name = name
        declared = {site.name: site for site in placed_sites(self) if site.name in points}
        for name, site in declared.items():
            points[name].site = site
        self._hook_points = {name: points[name] for name in [*declared, *(n for n in points if n not in declared)]}
        self._aliases = {theirs: ours for theirs, ours in placed_aliases(self) if theirs not in points}
        # The same for globs, which name no block: a name within a block -> the first block's site.
        local = {SiteName.parse(theirs).local: SiteName.parse(ours) for theirs, ours in reversed(self._aliases.items())}
        self._local_aliases = local

    def __getattr__(self, name: str) -> Any:
        """Parameters and modules; for other libraries' names an error says what to use here."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in MODEL:
                raise AttributeError(advice(name, MODEL)) from None
            if name in SAELENS_MODEL:
                raise AttributeError(advice(name, SAELENS_MODEL, SAE_LENS)) from None
            if name.startswith(("W_", "b_")) and hasattr(type(self), name):  # a view of a weight that blocks lack
                lists = "model.blocks[i].named_parameters() lists a block's weights"
                raise AttributeError(
                    f"{type(self).__name__} has no {name}: its blocks have no such weight; {lists}"
                ) from None
            raise

    # Finding -------------------------------------------------------------------------------------------------

    @property
    def hook_dict(self) -> dict[str, HookPoint]:
        """Every hook point by name, in computing order. Single states (`...hook_h.4`) exist when asked for."""
        return self._hook_points

    def default_names(self) -> list[str]:
        """The sites that a cache without a filter holds."""
        return [name for name, point in self.hook_dict.items() if point.site is None or point.site.row.is_default]

    def resolve(self, name: str) -> str:
        """A full name with aliases resolved; unknown names are returned unchanged."""
        site = SiteName.parse(name)
        base = str(site.base)
        if base in self._hook_points:
            return name
        if base in self._aliases:
            return f"{self._aliases[base]}{name.removeprefix(base)}"
        ours = self._local_aliases.get(site.base.local)
        return unalias(name) if ours is None else str(site.at(ours.place, ours.hook))

    def act_name(self, name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
        """Full name of one of this model's sites from its short one: :func:`~hooked_mamba.hooks.names.get_act_name`,
        which knows all models, with the branch that has such a site here. Unknown names are returned unchanged."""
        chosen = layer_type is not None or (layer is not None and names_its_branch(name))
        name = self.resolve(get_act_name(name, layer, layer_type))
        site = SiteName.parse(name)
        if chosen or site.layer is None or site.hook in OF_ATTENTION or str(site.base) in self._hook_points:
            return name
        places = (other.place for other in map(SiteName.parse, self._hook_points) if other.hook == site.hook)
        here = {str(site.at(place, site.hook).base): place for place in places if not place.endswith("norm")}
        place = next((place for full, place in here.items() if full in self._hook_points), site.place)
        return str(site.at(place, site.hook))

    def names_of(self, names_filter: NamesFilter) -> list[str]:
        """Full names that a filter (a name, glob, list or predicate) chooses, in computing order."""
        return match_names(names_filter, list(self.hook_dict), self.resolve)

    def hook_point(self, name: str) -> HookPoint:
        """The hook point of a full name, single states included."""
        return self._point(self.resolve(name))

    def _point(self, name: str) -> HookPoint:
        """The hook point of one of our own names."""
        site = SiteName.parse(name)
        found = self._hook_points.get(str(site.base))
        if found is not None and site.t is None:
            return found
        if isinstance(found, StateHookPoint) and site.t is not None:
            return found.at(site.t)
        raise unknown_name(name, list(self._hook_points))

    def site(self, name: str) -> PlacedSite:
        """What is declared about a site: its shape, width, axes and meaning.

        Raises
        ------
        HookNameError
            No site of that name.
        KeyError
            A hook point that no module declares.
        """
        site = self.hook_point(name).site
        if site is None:
            raise KeyError(f"{name} is a hook point without a declaration: list it in its module's `sites`")
        return site

    def points_of(self, names_filter: NamesFilter) -> dict[str, HookPoint]:
        """Hook points by full name for all that a filter matches, in order of computation."""
        return {name: self._point(name) for name in self.names_of(names_filter)}

    def hook_points(self) -> list[HookPoint]:
        """Every hook point, including single states that are in use."""
        found: list[HookPoint] = []
        for point in self.hook_dict.values():
            found.append(point)
            if isinstance(point, StateHookPoint):
                found.extend(point.live_points())
        return found

    # Adding and removing -------------------------------------------------------------------------------------

    def add_hook(
        self,
        name: NamesFilter,
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> None:
        """Add `hook(tensor, hook)` to every site that `name` (a name, glob, list or predicate) matches."""
        for point in self.points_of(name).values():
            point.add_hook(hook, dir, is_permanent, level, prepend)

    def add_perma_hook(self, name: NamesFilter, hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd") -> None:
        """A hook that `reset_hooks()` leaves in place."""
        self.add_hook(name, hook, dir, is_permanent=True)

    def reset_hooks(
        self,
        clear_contexts: bool = True,
        direction: Literal["fwd", "bwd", "both"] = "both",
        including_permanent: bool = False,
        level: int | None = None,
    ) -> None:
        """Remove what add_hook added, and clear every `hook.ctx`; permanent hooks only on request."""
        for point in self.hook_points():
            point.remove_hooks(direction, including_permanent, level)
            if clear_contexts:
                point.clear_context()

    def clear_contexts(self) -> None:
        """Clear every `hook.ctx`."""
        for point in self.hook_points():
            point.clear_context()

    @contextmanager
    def hooks(
        self,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
    ) -> Iterator[HookedRoot]:
        """Hooks for the duration of a `with`: exactly these are removed at its end, even after an exception.

        Parameters
        ----------
        fwd_hooks, bwd_hooks
            Pairs (name, glob, list or predicate; `fn(tensor, hook)`).
        reset_hooks_end
            False leaves them in place until `reset_hooks()`.
        clear_contexts
            Clear every `hook.ctx` at the end.
        """
        self.context_level += 1
        added: list[tuple[list[Hook], Hook]] = []
        try:
            for direction, hooks in (("fwd", fwd_hooks), ("bwd", bwd_hooks)):
                if isinstance(hooks, tuple) and len(hooks) == 2 and callable(hooks[1]):
                    raise TypeError(f"{direction}_hooks is a list of pairs (name, function): put [ ] around this one")
                for name, fn in hooks:
                    for point in self.points_of(name).values():
                        entry = point.add_hook(fn, direction, level=self.context_level)  # type: ignore[arg-type]
                        added.append((point.fwd_hooks if direction == "fwd" else point.bwd_hooks, entry))
            yield self
        finally:
            self.context_level -= 1
            if reset_hooks_end:
                for hooks_there, entry in added:
                    if entry in hooks_there:  # a reset inside the context may have been first
                        hooks_there.remove(entry)
            if clear_contexts:
                self.clear_contexts()

    # Running -------------------------------------------------------------------------------------------------

    def run_with_hooks(
        self,
        *model_args: Any,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        **model_kwargs: Any,
    ) -> Any:
        """Forward with temporary hooks. Backward hooks fire when `backward()` of this pass is called, also later."""
        self._check_arguments(model_kwargs, self.run_with_hooks)
        with self.hooks(fwd_hooks, bwd_hooks, reset_hooks_end, clear_contexts):
            return self(*model_args, **model_kwargs)

    def run_with_cache(
        self,
        *model_args: Any,
        names_filter: NamesFilter = None,
        device: str | torch.device | None = None,
        remove_batch_dim: bool = False,
        incl_bwd: bool = False,
        reset_hooks_end: bool = True,
        clear_contexts: bool = False,
        pos_slice: PosSlice = None,
        return_cache_object: bool = True,
        fwd_hooks: HookList = (),
        bwd_hooks: HookList = (),
        **model_kwargs: Any,
    ) -> tuple[Any, Any]:
        """Forward, keeping the final value of chosen sites.

        Without a filter every site is kept except the large ones of size b l E N (A_bar, B_bar, Bx and h in Mamba-1, Bx
        and h in Mamba-2), which must be named; with `pos_slice` only those positions are computed.

        Parameters
        ----------
        names_filter
            A name, a glob (`blocks.*.mixer.hook_dt`), a list of these, or a predicate. `...hook_h.17` caches the
            state after position 17, b E N.
        device
            Where to keep the cache; default: the model's device.
        remove_batch_dim
            Drop the batch axis; an error if the batch is larger than one.
        incl_bwd
            Also call `backward()` on the output, which must be one number (`return_type="loss"`), and keep the
            gradients as `<name>_grad`. Without a filter, sites that the fused scan does not need (Mamba-2's A_bar and
            B_bar) are kept but not their gradients, which would compute every state of every layer: name them for that.
        reset_hooks_end, clear_contexts, fwd_hooks, bwd_hooks
            As in :meth:`hooks`. The cache holds values after the hooks.
        pos_slice
            Positions to keep: an int drops the axis, a slice or list keeps it.
        return_cache_object
            False gives a plain dict.

        Returns
        -------
        Any, ActivationCache
            The model's output and an :class:`ActivationCache`; cached tensors are detached.
        """
        self._check_arguments(model_kwargs, self.run_with_cache)
        select = PositionSelect(pos_slice)
        if names_filter is None:
            points = {name: self._hook_points[name] for name in self.default_names()}
        else:
            points = self.points_of(names_filter)
        model_args, model_kwargs = self.prepared(points, select, device, model_args, model_kwargs, incl_bwd)
        values: dict[str, Tensor] = {}

        def keeper(name: str) -> Callable[[Tensor], None]:
            def keep(value: Tensor) -> None:
                values[name] = _detached(value, device)

            return keep

        def gradient_keeper(name: str) -> HookFunction:
            def keep(grad: Tensor, hook: HookPoint) -> None:
                values[f"{name}_grad"] = _detached(choice[name].apply(grad, hook.position_axis), device)

            return keep

        # A single state has no position axis to choose from.
        choice = {name: select if SiteName.parse(name).t is None else PositionSelect() for name in points}
        readers = [(point, Reader(keeper(name), choice[name])) for name, point in points.items()]
        differentiated = [
            name
            for name, point in points.items()
            if not point.holds_integers and not (names_filter is None and isinstance(point, LazyHookPoint))
        ]
        gradients = [(name, gradient_keeper(name)) for name in differentiated] if incl_bwd else []
        try:
            for point, reader in readers:
                point.readers.append(reader)
            with self.hooks(fwd_hooks, [*bwd_hooks, *gradients], reset_hooks_end, clear_contexts):
                out = self(*model_args, **model_kwargs)
                if incl_bwd:
                    _scalar(out).backward()
        finally:
            for point, reader in readers:
                point.readers.remove(reader)
            if incl_bwd and not reset_hooks_end:  # the gradient hooks are ours, not the user's
                kept = {fn for _, fn in gradients}
                for point in points.values():
                    point.bwd_hooks[:] = [h for h in point.bwd_hooks if h.fn not in kept]

        ordered = [*points, *(f"{name}_grad" for name in points)]
        mask = self.mask_of(*model_args, **model_kwargs)
        cache = self.cache_class(
            {name: values[name] for name in ordered if name in values},
            self,
            mask=mask,
            packed=self.is_packed(**model_kwargs),
        )
        if remove_batch_dim:
            cache.remove_batch_dim()
        return out, cache if return_cache_object else cache.cache_dict

    def prepared(
        self,
        points: dict[str, HookPoint],
        select: PositionSelect,
        device: str | torch.device | None,
        model_args: tuple[Any, ...],
        model_kwargs: dict[str, Any],
        incl_bwd: bool,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the forward pass that fills a cache; a model that knows its shapes refuses one that cannot
        fit, and hands on what it has worked out for that."""
        return model_args, model_kwargs

    def _check_arguments(self, given: dict[str, Any], caller: Callable[..., Any]) -> None:
        """Refuse a keyword that neither the caller nor `forward` has, with the nearest one.

        `forward` itself says what to use instead of those that other libraries have.
        """
        taken = inspect.signature(self.forward).parameters
        if any(p.kind is p.VAR_KEYWORD for p in taken.values()):
            return
        for name in given:
            if name not in taken and name not in OPTIONS and name not in GRANTED:
                mine = [p for p in inspect.signature(caller).parameters if not p.startswith("model_")]
                near = difflib.get_close_matches(name, [*mine, *taken], n=1)
                hint = f"; did you mean {near[0]}=?" if near else ""
                raise TypeError(f"{caller.__name__} got an unexpected keyword argument {name!r}{hint}")

    def is_packed(self, **model_kwargs: Any) -> bool:
        """Whether a call has rows with several documents."""
        return False

    def mask_of(self, *model_args: Any, **model_kwargs: Any) -> Tensor | None:
        """Which columns of a prepared call are real, b l; None where all are."""
        return None


def _detached(value: Tensor, device: str | torch.device | None) -> Tensor:
    value = value.detach()
    return value if device is None else value.to(device)


def _scalar(out: Any) -> Tensor:
    if not isinstance(out, Tensor) or out.numel() != 1:
        got = f"a tensor of shape {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
        raise ValueError(f"incl_bwd needs a model output of one number, such as return_type='loss'; got {got}")
    return out


HookedRootModule = HookedRoot
"""TransformerLens' name, for modules of one's own."""
