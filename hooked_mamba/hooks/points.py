"""Hook points: the named places where a forward pass can be read and written."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_mamba.hooks.positions import PositionSelect
from hooked_mamba.hooks.site import PlacedSite
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.names_elsewhere import advice
from hooked_mamba.transformerlens_names import POINT

HookFunction = Callable[..., Any]
"""`fn(tensor, hook) -> tensor or None`: None keeps the value, a tensor replaces it."""

Direction = Literal["fwd", "bwd", "both"]


@dataclass(eq=False)
class Hook:
    """One function at one hook point."""

    fn: HookFunction
    is_permanent: bool = False
    level: int | None = None
    """Depth of the `hooks()` context that added it; None when added outside of any."""
    by_keyword: bool = field(init=False)

    def __post_init__(self) -> None:
        self.by_keyword = _takes_hook_by_keyword(self.fn)

    @property
    def fits(self) -> bool:
        """Whether the function takes a tensor and a hook point; builtins cannot be checked and are accepted."""
        try:
            signature = inspect.signature(self.fn)
        except (TypeError, ValueError):
            return True
        try:
            signature.bind(None, hook=None) if self.by_keyword else signature.bind(None, None)
        except TypeError:
            return False
        return True

    def __call__(self, value: Tensor, hook_point: HookPoint) -> Any:
        try:
            return self.fn(value, hook=hook_point) if self.by_keyword else self.fn(value, hook_point)
        except Exception as error:  # torch's errors do not say where
            error.add_note(f"in a hook at {hook_point.name}, whose value is {_describe(value)}")
            raise


@dataclass(eq=False)
class Reader:
    """A store for a site's final value, after all hooks: what a cache attaches."""

    store: Callable[[Tensor], None]
    select: PositionSelect


def _takes_hook_by_keyword(fn: HookFunction) -> bool:
    """TransformerLens passes `hook=`; a function whose second argument has another name gets it by position."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (TypeError, ValueError):  # builtins have no signature
        return False
    return any(p.kind is p.VAR_KEYWORD or (p.name == "hook" and p.kind is not p.POSITIONAL_ONLY) for p in parameters)


class HookPoint(nn.Module):
    """An identity with a name. What its hooks return is what the rest of the computation uses.

    Forward hooks run in the order they were added; each gets its own copy of the value, so editing in place is safe.
    Backward hooks get the gradient of whatever is differentiated with respect to the value here, and belong to the
    forward pass that they saw: they fire even if they are removed before `backward()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name: str | None = None
        self.site: PlacedSite | None = None
        """What the module that owns this point declares of it; None for a point that nobody declared."""
        self.ctx: dict[Any, Any] = {}
        self.fwd_hooks: list[Hook] = []
        self.bwd_hooks: list[Hook] = []
        self.readers: list[Reader] = []

    def __getattr__(self, name: str) -> Any:
        """Torch's attributes; for TransformerLens' names an error says what to use here."""
        if name in POINT:
            raise AttributeError(advice(name, POINT))
        return super().__getattr__(name)

    # What sits here ------------------------------------------------------------------------------------------

    @property
    def edited(self) -> bool:
        """Whether a hook here may change the value or needs its gradient."""
        return bool(self.fwd_hooks or self.bwd_hooks)

    @property
    def wanted(self) -> bool:
        """Whether anything is attached here."""
        return bool(self.fwd_hooks or self.bwd_hooks or self.readers)

    @property
    def holds_integers(self) -> bool:
        """Whether it is declared to hold token ids or indices."""
        return self.site is not None and self.site.row.integer

    @property
    def position_axis(self) -> int:
        """Which axis of its value holds the positions."""
        return 1 if self.site is None else self.site.row.position_axis

    def add_hook(
        self,
        hook: HookFunction,
        dir: Literal["fwd", "bwd"] = "fwd",
        is_permanent: bool = False,
        level: int | None = None,
        prepend: bool = False,
    ) -> Hook:
        """Add `fn(tensor, hook)`; with `prepend` it runs before the existing ones."""
        if not callable(hook):
            raise TypeError(f"a hook at {self.name} must be a function fn(tensor, hook), got {type(hook).__name__}")
        entry = Hook(hook, is_permanent, level)
        if not entry.fits:
            raise TypeError(
                f"a hook at {self.name} is called as fn(tensor, hook), and {getattr(hook, '__name__', hook)!s} does not"
                " take these two arguments"
            )
        hooks = self._hooks(dir)
        hooks.insert(0, entry) if prepend else hooks.append(entry)
        return entry

    def add_perma_hook(self, hook: HookFunction, dir: Literal["fwd", "bwd"] = "fwd") -> Hook:
        """Add a hook that only `remove_hooks(including_permanent=True)` removes."""
        return self.add_hook(hook, dir, is_permanent=True)

    def remove_hooks(self, dir: Direction = "fwd", including_permanent: bool = False, level: int | None = None) -> None:
        """Remove hooks: all non-permanent ones, or those of one context level."""
        if dir not in ("fwd", "bwd", "both"):
            raise ValueError(f"dir must be 'fwd', 'bwd' or 'both', got {dir!r}")
        for one in ("fwd", "bwd") if dir == "both" else (dir,):
            hooks = self._hooks(one)
            hooks[:] = [
                h
                for h in hooks
                if not (including_permanent or (not h.is_permanent and (level is None or h.level == level)))
            ]

    def clear_context(self) -> None:
        """Clear what hooks stored in `ctx`."""
        self.ctx = {}

    def layer(self) -> int:
        """The block this point belongs to."""
        layer = SiteName.parse(self.name or "").layer
        if layer is None:
            raise ValueError(f"{self.name!r} belongs to no block")
        return layer

    def extra_repr(self) -> str:
        return f"{len(self.fwd_hooks)} fwd, {len(self.bwd_hooks)} bwd" if self.edited else ""

    def _hooks(self, dir: str) -> list[Hook]:
        if dir not in ("fwd", "bwd"):
            raise ValueError(f"dir must be 'fwd' or 'bwd', got {dir!r}")
        return self.fwd_hooks if dir == "fwd" else self.bwd_hooks

    # What happens here ---------------------------------------------------------------------------------------

    def __call__(self, value: Tensor) -> Tensor:
        """The value after all hooks; without hooks this costs no more than a function call."""
        if self.fwd_hooks or self.bwd_hooks or self.readers or self._forward_hooks or self._forward_pre_hooks:
            return super().__call__(value)
        return value

    def forward(self, value: Tensor) -> Tensor:
        value = self.edit(value)
        self.show(value)
        return value

    def edit(self, value: Tensor) -> Tensor:
        """The value as the hooks here leave it."""
        if self.fwd_hooks:
            given = value
            for hook in tuple(self.fwd_hooks):
                # A copy each: an edit in place must not reach other sites' tensors, which may share this memory.
                mine = value.clone()
                out = hook(mine, self)
                value = mine if out is None else self._checked(out, value, "forward")
            value = _laid_out_like(given, value)
        if self.bwd_hooks:
            value = self._watch_gradient(value)
        return value

    def show(self, value: Tensor) -> None:
        """Give the final value to the readers here."""
        for reader in tuple(self.readers):
            reader.store(reader.select.apply(value, self.position_axis))

    def _watch_gradient(self, value: Tensor) -> Tensor:
        if not value.is_floating_point():
            raise RuntimeError(f"{self.name} holds integers, which have no gradient: remove its backward hook")
        if not torch.is_grad_enabled():
            raise RuntimeError(f"a backward hook on {self.name} cannot fire: gradients are switched off here")
        # Own node: one tensor may be the value of two sites, each of which has a gradient of its own.
        value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
        hooks = tuple(self.bwd_hooks)

        def run(grad: Tensor) -> Tensor:
            for hook in hooks:
                out = hook(grad, self)
                if isinstance(out, tuple) and len(out) == 1:  # TransformerLens' form
                    out = out[0]
                grad = grad if out is None else self._checked(out, grad, "backward")
            return grad

        value.register_hook(run)
        return value

    def _checked(self, out: Any, value: Tensor, kind: str) -> Tensor:
        if not isinstance(out, Tensor):
            raise TypeError(f"a {kind} hook at {self.name} returned {type(out).__name__}; expected a tensor or None")
        if out.shape != value.shape or out.dtype != value.dtype or out.device != value.device:
            raise ValueError(f"a {kind} hook at {self.name} returned {_describe(out)}; expected {_describe(value)}")
        return out


class LazyHookPoint(HookPoint):
    """A site that is computed only when it is in use, since it is large or slows the scan.

    Edits need the whole value inside the computation. Readers get theirs through :meth:`read`, at the positions they
    ask for.
    """

    def read(self, length: int, values_at: Callable[[list[int] | slice], Tensor]) -> None:
        """Give each reader `values_at(its positions)`; nothing is computed without readers."""
        for reader in tuple(self.readers):
            reader.store(reader.select.finish(values_at(reader.select.index(length)), self.position_axis))


class StateHookPoint(LazyHookPoint):
    """`hook_h`: the stacked states as read, and `hook_h.{t}`: the state right after position t, carried forward."""

    def __init__(self) -> None:
        super().__init__()
        self.points: dict[int, HookPoint] = {}
        self.offset: int | None = None
        """Columns before this call, while generating; None outside, where a position out of range is an error."""
        self.padding: Any = None
        """The :class:`~hooked_mamba.state.Padding` of the call under way; None where all columns are real."""
        self.documents: Any = None
        """The :class:`~hooked_mamba.documents.Documents` of the call under way; None where each row is one."""

    def at(self, t: int) -> HookPoint:
        """The hook point of the state after position t; negative t counts from each row's last real token."""
        if t not in self.points:
            point = HookPoint()
            point.name = f"{self.name}.{t}"
            point.site = None if self.site is None else self.site.single(t)
            self.points[t] = point
        return self.points[t]

    def live_points(self) -> Iterator[HookPoint]:
        """The single-state points that are in use. The others are kept, since someone may hold a reference."""
        yield from [point for point in self.points.values() if point.wanted or point.ctx]

    def points_at(self, length: int) -> dict[int, list[HookPoint]]:
        """Columns of this call -> the wanted points there, in ascending order."""
        found: dict[int, list[HookPoint]] = {}
        for t, point in self.points.items():
            if not point.wanted:
                continue
            column = self._from_end(t, length) if t < 0 else t - (self.offset or 0)
            if not 0 <= column < length:
                if self.offset is not None:
                    continue  # generating: another call holds this position
                raise IndexError(
                    f"{point.name}: position {t} is out of range, this call has {length} positions"
                    f" ({-length} to {length - 1})"
                )
            found.setdefault(column, []).append(point)
        return dict(sorted(found.items()))

    def _from_end(self, t: int, length: int) -> int:
        """The column of a negative position. In rows that end at different columns -1 is the last one, where padding
        has left each row's state as its last token made it; what was read there is `scan_through_hooks`' affair."""
        if self.padding is None:
            return t + length
        ends = self.padding.ends
        real = int((ends - self.padding.left).min())
        if -t > real:
            raise IndexError(f"{self.name}.{t}: a row of this batch has {real} real tokens")
        if t == -1:
            return int(ends.max()) - 1
        if bool((ends != ends[0]).any()):
            raise ValueError(
                f"{self.name}.{t}: the rows of this batch are padded on the right and end at different columns, so that"
                " their states there cannot be edited together: pad on the left (padding_side='left')"
            )
        return t + int(ends[0])

    def own_ends(self) -> dict[int, Tensor]:
        """Each row's last real column where these differ and a function edits `hook_h.-1`: column -> mask of rows."""
        last = self.points.get(-1)
        if self.padding is None or last is None or not last.edited:
            return {}
        ends = self.padding.ends - 1
        columns = ends.unique().tolist()
        return {column: ends == column for column in columns} if len(columns) > 1 else {}


def _laid_out_like(example: Tensor, value: Tensor) -> Tensor:
    """The value with the example's strides: on others a SiLU may round differently, and a hook that changes nothing
    would change bits."""
    if value.stride() == example.stride() or 0 in example.stride():
        return value
    return torch.empty_strided(value.shape, example.stride(), dtype=value.dtype, device=value.device).copy_(value)


def _describe(t: Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')} {list(t.shape)} on {t.device}"
