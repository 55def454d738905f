"""What a model carries from call to call, and which positions of a padded batch are real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mamba.documents import Documents

Kind = TypeVar("Kind", bound=type)


def loadable(cls: Kind) -> Kind:
    """Let `torch.load(weights_only=True)` create this class, which only holds tensors."""
    torch.serialization.add_safe_globals([cls])
    return cls


@loadable
class LayerState(NamedTuple):
    """Memory of one Mamba mixer: all that later positions can know about earlier ones."""

    conv: Tensor
    """The last d_conv - 1 inputs of the convolution, b K-1 conv_dim."""
    ssm: Tensor
    """The scan's state, b E N (Mamba-2: b H P N), float32, or float64 in a float64 model."""


BranchState = tuple[Tensor, ...]
"""Memory of one branch of a block: a named tuple of tensors with the batch in front; () for a branch without any."""

Part = Callable[[Tensor], Tensor]


@loadable
@dataclass(frozen=True)
class BlockState:
    """Memory of one block: that of each branch, by its name. `state.ssm` is the `ssm` of the branch that has one."""

    branches: Mapping[str, BranchState]

    def __getitem__(self, branch: str) -> BranchState:
        return self.branches[branch]

    def __getattr__(self, part: str) -> Tensor:
        if part == "branches" or part.startswith("__"):  # while a copy is being made
            raise AttributeError(part)
        owners = [name for name, state in self.branches.items() if part in getattr(state, "_fields", ())]
        if len(owners) != 1:
            found = [f"{name}.{p}" for name, state in self.branches.items() for p in getattr(state, "_fields", ())]
            raise AttributeError(
                f"{len(owners) or 'no'} branches of this block have {part!r} in their memory; there"
                f" {'is' if len(found) == 1 else 'are'} {', '.join(found) or 'none'}"
            )
        return getattr(self.branches[owners[0]], part)

    def __iter__(self) -> Iterator[Tensor]:
        for state in self.branches.values():
            yield from state

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Pairs ("mixer.ssm", tensor)."""
        for name, state in self.branches.items():
            for part, tensor in zip(getattr(state, "_fields", ()), state, strict=True):
                yield f"{name}.{part}", tensor

    def map(self, fn: Part) -> BlockState:
        """The same memory with every tensor passed through a function."""
        return BlockState(
            {name: type(state)(*map(fn, state)) if state else state for name, state in self.branches.items()}
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockState:
        return self.map(Tensor.clone)  # also of a pass with gradients, whose tensors deepcopy itself refuses

    def with_part(self, part: str, value: Tensor) -> BlockState:
        """The same memory with one part ("ssm") replaced in the branch that has it."""
        getattr(self, part)  # says what is wrong with the name
        return BlockState(
            {
                name: state._replace(**{part: value}) if part in getattr(state, "_fields", ()) else state  # type: ignore[attr-defined]
                for name, state in self.branches.items()
            }
        )


@loadable
@dataclass(frozen=True, init=False)
class ModelState:
    """Memory of a model after some positions; give it back as `initial_state` to continue from there.

    Parameters
    ----------
    layers
        One for each block; a bare :class:`LayerState` is taken for that of a block with one mixer.
    seen
        Real tokens read so far in each row; None: not counted (a state made by hand), taken for 0.
    """

    layers: tuple[BlockState, ...]
    seen: Int[Tensor, " b"] | None

    def __init__(self, layers: Iterable[BlockState | BranchState], seen: Int[Tensor, " b"] | None = None) -> None:
        blocks = (layer if isinstance(layer, BlockState) else BlockState({"mixer": layer}) for layer in layers)
        object.__setattr__(self, "layers", tuple(blocks))
        object.__setattr__(self, "seen", seen)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, layer: int) -> BlockState:
        return self.layers[layer]

    def __iter__(self) -> Iterator[BlockState]:
        return iter(self.layers)

    @property
    def batch(self) -> int:
        """Rows."""
        return next(len(t) for layer in self.layers for t in layer)

    def detach(self) -> ModelState:
        """The same numbers, detached from the graph."""
        return self._map(Tensor.detach)

    def clone(self) -> ModelState:
        """A copy that shares no memory."""
        return self._map(Tensor.clone)

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelState:
        return self.clone()

    def to(self, *args, **kwargs) -> ModelState:
        """Move, as `Tensor.to` does; dtypes are adapted by each call."""
        return self._map(
            lambda t: t.to(*args, **kwargs) if t.is_floating_point() else t.to(t.to(*args, **kwargs).device)
        )

    def rows(self, index: Tensor | list[int]) -> ModelState:
        """Chosen rows of the batch; repeat an index to branch."""
        return self._map(lambda t: t[index])

    def nbytes(self) -> int:
        """Memory it takes."""
        return sum(t.numel() * t.element_size() for layer in self.layers for t in layer)

    def _map(self, fn: Part) -> ModelState:
        seen = None if self.seen is None else fn(self.seen)
        return ModelState((layer.map(fn) for layer in self.layers), seen)


@dataclass
class Call:
    """What one forward pass gives to every branch besides the stream."""

    padding: Padding | None = None
    """Masked columns; None where all are real."""
    seen: Int[Tensor, " b"] | None = None
    """Real tokens of each row before this call; None: 0."""
    carry: dict[str, Tensor] = field(default_factory=dict)
    """What one layer leaves for later ones, by name, such as RWKV-7's v_first."""
    documents: Documents | None = None
    """Documents packed into the rows; None: each row is one."""
    read: int | None = None
    """Of how many of the last columns, one at least, a block's output is read: it has no others. None: of all."""
    turns: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Cosines and sines of positions that a layer of this pass has worked out, for the next one."""
    hidden: dict[tuple[Any, ...], Float[Tensor, "l m"]] = field(default_factory=dict)
    """-inf where a query must not look, in calls without padding, that a layer of this pass has made for the next."""
    all_real: Bool[Tensor, "b l"] | None = None
    """The mask of a call without padding, cached once a layer has asked for it."""

    def to(self, device: torch.device) -> Call:
        """The same for blocks that are on another device."""
        seen = None if self.seen is None else self.seen.to(device)
        padding = None if self.padding is None else self.padding.to(device)
        documents = None if self.documents is None else self.documents.to(device)
        carry = {name: value.to(device) for name, value in self.carry.items()}
        return Call(padding, seen, carry, documents, self.read)

    def whole(self) -> Call:
        """The same with every column read."""
        return self if self.read is None else replace(self, read=None)

    @property
    def plain(self) -> bool:
        """Whether every column is real and every row one document."""
        return self.padding is None and self.documents is None

    def positions(self, batch: int, length: int, device: torch.device) -> Int[Tensor, "b l"]:
        """How many real tokens of its document precede each column: the position that embeddings use."""
        if self.padding is None:
            columns = torch.arange(length, device=device).expand(batch, -1)
        else:
            columns = (self.padding.mask.long().cumsum(1) - 1).clamp(min=0)
        before = 0 if self.seen is None else self.seen[:, None]
        if self.documents is None:
            return columns + before
        first = columns.gather(1, self.documents.first_column)
        return columns - torch.where(self.documents.number == 0, -before, first)

    def real_columns(self, batch: int, length: int, device: torch.device) -> Bool[Tensor, "b l"]:
        """Which columns hold real tokens; made once for all layers."""
        if self.padding is not None:
            return self.padding.mask
        if self.all_real is None or self.all_real.device != device:
            self.all_real = torch.ones(batch, length, dtype=torch.bool, device=device)
        return self.all_real

    def seen_after(self, batch: int, length: int, device: torch.device) -> Int[Tensor, " b"]:
        """Real tokens of each row, of its last document, when this call is over."""
        if self.documents is not None:
            real = self.documents.in_last if self.padding is None else self.documents.in_last & self.padding.mask
            read, fresh = real.sum(1), self.documents.starts.any(1)
            return read if self.seen is None else read + torch.where(fresh, 0, self.seen)
        read = torch.full((batch,), length, device=device) if self.padding is None else self.padding.mask.sum(1)
        return read if self.seen is None else self.seen + read


def columns_read(value: Float[Tensor, "b l ..."], call: Call | None) -> Float[Tensor, "b m ..."]:
    """The last columns of a value, those that `call.read` names."""
    if call is None or call.read is None:
        return value
    return value[:, max(0, value.shape[1] - call.read) :]


@dataclass(frozen=True)
class Padding:
    """Real and padded columns of a batch: `left[i]` masked columns, real ones, then `right[i]` masked ones."""

    mask: Bool[Tensor, "b l"]
    left: Int[Tensor, " b"]
    right: Int[Tensor, " b"]

    @classmethod
    def from_mask(
        cls, attention_mask: Any, tokens_shape: Sequence[int], device: torch.device | None = None
    ) -> Padding | None:
        """Check a mask of 0s and 1s, a tensor or lists; None where nothing is masked. One that was checked is taken as
        it is."""
        if isinstance(attention_mask, Padding):
            return attention_mask
        attention_mask = torch.as_tensor(attention_mask, device=device)
        tokens_shape = torch.Size(tokens_shape)
        if attention_mask.shape != tokens_shape:
            raise ValueError(
                f"attention_mask is {list(attention_mask.shape)}, expected {list(tokens_shape)} like the tokens"
            )
        if not ((attention_mask == 0) | (attention_mask == 1)).all():
            raise ValueError("attention_mask may hold only 0 (padding) and 1 (a real token)")
        mask = attention_mask.bool()
        if mask.all():
            return None
        length = mask.shape[1]
        columns = torch.arange(length, device=mask.device)
        real = mask.sum(1)
        left = torch.where(real > 0, mask.int().argmax(1), length)
        holes = mask != ((columns >= left[:, None]) & (columns < (left + real)[:, None]))
        if holes.any():
            row, column = holes.nonzero()[0].tolist()
            raise ValueError(
                f"attention_mask has a hole: row {row} is masked between real tokens (column {column});"
                " a state-space model cannot skip a position inside a sequence, remove the token instead"
            )
        return cls(mask, left, length - left - real)

    def to(self, device: torch.device) -> Padding:
        """The same on another device."""
        return Padding(self.mask.to(device), self.left.to(device), self.right.to(device))

    @property
    def ends(self) -> Int[Tensor, " b"]:
        """Column after each row's last real token: a position t < 0 of a row is its column ends + t."""
        return self.mask.shape[1] - self.right

    def zero(self, x: Float[Tensor, "b l *rest"]) -> Float[Tensor, "b l *rest"]:
        """x with exact zeros at padded positions."""
        mask = self.mask.reshape(*self.mask.shape, *(1,) * (x.ndim - 2))
        return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


def zero_padding(padding: Padding | None) -> Callable[[Tensor], Tensor]:
    """`padding.zero`, or the identity for a batch without padding."""
    return padding.zero if padding is not None else _unchanged


def _unchanged(x: Tensor) -> Tensor:
    return x


def with_history(
    x: Float[Tensor, "b l c"],
    history: Float[Tensor, "b k c"],
    padding: Padding | None,
    documents: Documents | None = None,
) -> tuple[Float[Tensor, "b m c"], Float[Tensor, "b k c"] | None, Float[Tensor, "b k c"]]:
    """Convolution inputs, the k inputs before them, and the last k for the next call.

    In a left-padded row the history is placed right before the first real position, and in a right-padded row the next
    history ends at the last real one: each row is treated as if it were alone. With padding the inputs that come back
    hold their history (m = k + l), and None stands for what is before them; so also where they are fewer than k. For
    packed documents the next history is that of the last one.
    """
    if documents is not None:
        fresh = documents.starts.any(1)[:, None, None]
        inputs, before, _ = with_history(x, history, padding)
        left = torch.where(fresh, torch.zeros((), dtype=history.dtype, device=history.device), history)
        return inputs, before, with_history(documents.keep_last(x), left, padding)[2]
    k, length = history.shape[1], x.shape[1]
    history = history.to(x.dtype)
    if padding is None and length < k:  # joined once; as small as it is, a view of it keeps little alive
        x = torch.cat([history, x], 1)
        return x, None, x[:, length:]
    if padding is None:
        return x, history, x[:, length - k :].clone()  # a view would keep what is not needed alive
    x = torch.cat([history, x], 1)
    offsets = torch.arange(k, device=x.device)

    def columns(first: Int[Tensor, " b"]) -> Int[Tensor, "b k c"]:
        return (first[:, None] + offsets)[..., None].expand(-1, -1, x.shape[2])

    x = x.scatter(1, columns(padding.left), history)
    return x, None, x.gather(1, columns(length - padding.right))
