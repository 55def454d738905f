"""Activations of chosen positions, of every wanted stream, from ONE forward pass of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.models import HookedModel
from saes.located import locate
from saes.store.rows import Rows
from saes.targets import last_layer, stream_values, window_of


class Capture:
    """Reads streams of a model at the positions that count.

    Parameters
    ----------
    model
        Run once a call, no further than the last layer that is needed.
    streams
        Names, see `saes.targets`.
    positions_per_row
        Random positions of a row to keep, the same ones for all rows of a call; None: all. What is not kept of a
        large site (hook_h) is not even formed, unless a stream of windows is captured with it.
    channels
        Stream -> entries of its first axis after the positions (channels or heads of hook_h).
    exclude_tokens
        Token ids whose positions are left out, such as `<|endoftext|>`. Padding always is.
    dtype
        Of what is kept.
    device
        Where it is kept; default: where the model is.
    """

    def __init__(
        self,
        model: HookedModel,
        streams: Sequence[str],
        *,
        positions_per_row: int | None = None,
        channels: Mapping[str, Sequence[int]] | None = None,
        exclude_tokens: Sequence[int] = (),
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        if not streams:
            raise ValueError("there is nothing to capture: no streams")
        if positions_per_row is not None and positions_per_row < 1:
            raise ValueError(f"positions_per_row must be at least 1, got {positions_per_row}")
        self.model = model
        self.channels = {name: [int(i) for i in chosen] for name, chosen in (channels or {}).items()}
        for name in self.channels:
            if name not in streams:
                raise ValueError(f"channels are chosen of {name!r}, which is not captured: {', '.join(streams)}")
        located = {name: locate(name, model, self.channels.get(name)) for name in dict.fromkeys(streams)}
        self.widths = {name: place.width for name, place in located.items()}
        self.names = list(dict.fromkeys(site for place in located.values() for site in place.sites))
        self.last = last_layer(self.names)
        self.windowed = any(window_of(name)[1] > 1 for name in located)
        self.positions_per_row = positions_per_row
        self.exclude_tokens = tuple(int(token) for token in exclude_tokens)
        self.dtype, self.device = dtype, device

    def __call__(self, rows: Rows, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Stream -> n width, the same n positions in all; `generator` draws them where only some are kept.

        Raises
        ------
        FloatingPointError
            If the model gives NaN or infinity.
        """
        chosen, counted = self.positions(rows, generator)
        beginnings = rows.beginnings() if self.windowed else None
        with torch.no_grad():
            _, cache = self.model.run_with_cache(
                rows.tokens,
                names_filter=self.names,
                pos_slice=None if self.windowed else chosen,  # windows reach back to positions that are not kept
                **rows.arguments(),
                return_type=None,
                stop_at_layer=None if self.last is None else self.last + 1,
            )
            assert isinstance(cache, ActivationCache)
            out = {}
            for stream in self.widths:
                value = stream_values(stream, cache, self.model, self.channels.get(stream), beginnings)
                value = value[:, chosen] if self.windowed and chosen is not None else value
                value = value.flatten(0, 1)
                if not bool(counted.all()):
                    value = value[counted.flatten().to(value.device)]
                value = value.to(device=self.device, dtype=self.dtype, copy=True)
                if not bool(torch.isfinite(value).all()):
                    raise FloatingPointError(f"{stream} holds NaN or infinity: the model overflows on this text")
                out[stream] = value
        return out

    def positions(
        self, rows: Rows, generator: torch.Generator | None = None
    ) -> tuple[list[int] | None, Bool[Tensor, "b p"]]:
        """Which positions of a row are kept (None: all), and which of those count; the model does not run."""
        chosen = self._positions(rows.tokens.shape[1], generator)
        counted = rows.real
        for token in self.exclude_tokens:
            counted = counted & (rows.tokens != token)
        return chosen, counted if chosen is None else counted[:, chosen]

    def _positions(self, length: int, generator: torch.Generator | None) -> list[int] | None:
        if self.positions_per_row is None or self.positions_per_row >= length:
            return None
        return torch.randperm(length, generator=generator)[: self.positions_per_row].sort().values.tolist()
