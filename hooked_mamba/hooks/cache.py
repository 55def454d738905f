"""The cache: the values at a forward pass's hook sites, by name."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, ValuesView
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from hooked_mamba.display import cache_html
from hooked_mamba.hooks.names import unknown_name
from hooked_mamba.hooks.positions import PositionSelect, PosSlice
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.names_elsewhere import advice, knows_options
from hooked_mamba.transformerlens_names import CACHE, GRANTED, OPTIONS

Key = str | tuple[str, int] | tuple[str, int, str | None]
"""A full name, or (short name, layer) or (short name, layer, layer_type) as `get_act_name` takes them."""

Cache = TypeVar("Cache", bound="HookCache")
"""The class of a cache, which its copies have too."""


class HookCache:
    """Cached activations by name.

    `cache["blocks.0.mixer.hook_dt"]`, `cache["dt", 0]`, `cache["resid_pre", 1]`, `cache["h.4", 2]`,
    `cache["embed"]`, `cache["scale"]` (the final norm's).

    Parameters
    ----------
    cache_dict
        Tensors by full name, b l ...; single states b E N.
    model
        The model that made them.
    has_batch_dim
        False once :meth:`remove_batch_dim` was called.
    mask
        b l, True at the real tokens of a padded batch; None where all are real.
    packed
        Whether rows hold several documents (`document_ids`).
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: Any,
        has_batch_dim: bool = True,
        mask: Tensor | None = None,
        packed: bool = False,
    ) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.mask = mask
        self.packed = packed

    def __getattr__(self, name: str) -> NoReturn:
        """Called only for unknown names; for TransformerLens' names the error says what to use here."""
        if name in CACHE:
            raise AttributeError(advice(name, CACHE))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __getitem__(self, key: Key) -> Tensor:
        name = self._full_name(key)
        if name not in self.cache_dict:
            if self._is_a_site(name.removesuffix("_grad")):
                raise KeyError(
                    f"{name} was not cached. Ask for it by names_filter={name.removesuffix('_grad')!r}"
                    + (" and incl_bwd=True" if name.endswith("_grad") else "")
                    + f"; this cache holds {len(self.cache_dict)} sites"
                )
            raise unknown_name(name, list(self.model.hook_dict))
        return self.cache_dict[name]

    def __contains__(self, key: object) -> bool:
        try:
            return self._full_name(key) in self.cache_dict  # type: ignore[arg-type]
        except (KeyError, TypeError):
            return False

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self)} sites, {self.nbytes() / 2**20:.1f} MiB)"

    def _repr_html_(self) -> str:
        return cache_html(self)

    def keys(self) -> KeysView[str]:
        """Full names."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """Tensors."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Pairs of full name and tensor."""
        return self.cache_dict.items()

    def text(self, key: Key) -> str:
        """What a site holds, as its module describes it; "" without a description."""
        site = self.model.hook_point(self._full_name(key).removesuffix("_grad")).site
        return "" if site is None else site.row.text

    def nbytes(self) -> int:
        """Memory of the tensors, counting shared memory once."""
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.values()}
        return sum(storages.values())

    @knows_options(OPTIONS, GRANTED)
    def remove_batch_dim(self: Cache) -> Cache:
        """Drop the batch axis of every tensor, in place.

        Raises
        ------
        ValueError
            The batch is larger than one, so that it is unclear which row to keep.
        """
        if self.has_batch_dim:
            for name, value in self.cache_dict.items():
                if value.shape[0] != 1:
                    raise ValueError(
                        f"cannot drop the batch axis of {value.shape[0]} rows ({name} is {list(value.shape)});"
                        " cache one prompt, or index the rows"
                    )
            self.cache_dict = {name: value[0] for name, value in self.cache_dict.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self: Cache, batch_slice: PosSlice) -> Cache:
        """A cache of chosen rows: an int drops the batch axis, a slice, list or index tensor keeps it, None takes all.

        Raises
        ------
        ValueError
            The batch axis has been removed already.
        """
        if batch_slice is None:
            return type(self)(dict(self.cache_dict), self.model, self.has_batch_dim, self.mask, self.packed)
        if not self.has_batch_dim:
            raise ValueError("this cache has no batch axis to choose rows from")
        select = PositionSelect(batch_slice, "batch_slice", "row")
        chosen = {name: value[select.index(value.shape[0])] for name, value in self.cache_dict.items()}
        if not select.keeps_axis:
            chosen = {name: value[0] for name, value in chosen.items()}
        mask = self.mask
        if mask is not None:  # b l still, also of one row
            mask = mask[select.index(len(mask))]
            mask = None if bool(mask.all()) else mask
        return type(self)(chosen, self.model, select.keeps_axis, mask, self.packed)

    def selected(self, pos_slice: PosSlice, argument: str = "pos_slice") -> PositionSelect:
        """Positions, checked against padding: see :meth:`PositionSelect.check_padding`."""
        select = PositionSelect(pos_slice, argument)
        select.check_padding(self.mask)
        return select

    @staticmethod
    def toggle_autodiff(mode: bool = False) -> None:
        """Switch gradients on or off for the whole process, as `torch.set_grad_enabled(mode)` does.

        `with torch.no_grad():` switches them off temporarily.
        """
        torch.set_grad_enabled(mode)

    @knows_options(OPTIONS, GRANTED)
    def to(self: Cache, device: str | torch.device) -> Cache:
        """Move every tensor, in place."""
        self.cache_dict = {name: value.to(device) for name, value in self.cache_dict.items()}
        return self

    def stack_activation(self, activation_name: str, layer: int = -1, sublayer_type: str | None = None) -> Tensor:
        """One site of all layers before `layer` (-1: all), stacked in front: layer b l ..."""
        n_layers = self.model.cfg.n_layers
        upto = n_layers if layer == -1 else layer
        return torch.stack([self[activation_name, i, sublayer_type] for i in range(upto)])

    def _full_name(self, key: Key) -> str:
        name, *rest = (key,) if isinstance(key, str) else key
        if name in self.cache_dict and not rest:
            return name
        if not isinstance(name, str):
            raise KeyError(f"a key is a name, or a name and a layer such as ('dt', 0): got {key!r}")
        grad = "_grad" if name.endswith("_grad") else ""
        layer = rest[0] if rest else None
        if isinstance(layer, int) and layer < 0:  # cache["resid_post", -1], as in TransformerLens
            layer += self.model.cfg.n_layers
        return self.model.act_name(name.removesuffix("_grad"), layer, *rest[1:]) + grad

    def _is_a_site(self, name: str) -> bool:
        return str(SiteName.parse(name).base) in self.model.hook_dict
