"""Knockout: cut the flow from chosen positions to chosen positions, in chosen layers, and nothing else.

On the value path: y_t loses sum_{s in S} alpha[t,s] u_s for the targets t, while dt, B, C and gates stay as this
forward pass computes them. One more scan, over the cut input alone, gives that sum in linear time (the scan is linear
in u). What is cut:

    source="token"   what the tokens S send through all taps of the convolution (TokenPath)
    source="scan"    the scan's own terms alpha[t,s] u_s, which already mix the tokens s-K+1..s

In attention a value belongs to its token, so both are zeros in the pattern (see `attention_knockout`).

Sharma, Atkinson & Bau 2024 (arXiv:2404.03646) and "Mamba Knockout" (arXiv:2505.24244) cut scan terms.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from hooked_mamba.analysis.attention_knockout import attention_knockout
from hooked_mamba.analysis.captured import (
    Positions,
    captured,
    channel_list,
    layer_list,
    padding_under_way,
    position_mask,
)
from hooked_mamba.analysis.columns import Columns, columns_before, kept
from hooked_mamba.analysis.cuts import Cut, Memory, Pass, changes_in, held, in_force, lost_reads, lost_writes
from hooked_mamba.frozen.tokens import Source
from hooked_mamba.state import Padding


@contextmanager
def knockout(
    model: Any,
    sources: Columns,
    targets: Columns = None,
    layers: int | Iterable[int] | None = None,
    source: Source = "token",
    cut: Literal["read", "write"] = "read",
    channels: int | Sequence[int] | None = None,
) -> Iterator[Any]:
    """Cut the flow from sources to targets in every forward pass inside the `with`, also in `generate`.

    Contexts of any kind can be nested in any order: what two of them cut is cut once.

    Parameters
    ----------
    model
        Its mixers must have a linear form; other hooks work as usual.
    sources, targets
        Positions (columns of the call; negative ones count from each row's last real token): an int, several, a
        slice, a mask b l with each row's own, or None for all.
        For `generate` see `hooked_mamba.analysis.columns.Columns`: what was read in earlier calls stays cut.
    layers
        None: all. Both mixers and attention are cut in each.
    source
        "token" or "scan", see above.
    cut
        "read": the targets do not see the sources' values; states stay as they are. "write": the values are never
        written into the state, so no position sees them and the returned state lacks them; `targets` must then be None.
        The skip D u is a read, which "write" leaves in place. Attention loses the reads of all targets; its keys and
        values stay in the cache.
    channels
        Channels e of E (in Mamba-2 e = h P + p) of the mixers, which leaves attention untouched; None: all.

    Raises
    ------
    ValueError
        Unknown `source` or `cut`, or targets together with cut="write".
    IndexError
        A layer or a channel that does not exist.
    """
    if source not in ("token", "scan"):
        raise ValueError(f"source must be 'token' or 'scan', got {source!r}")
    if cut not in ("read", "write"):
        raise ValueError(f"cut must be 'read' or 'write', got {cut!r}")
    if cut == "write" and targets is not None:
        raise ValueError("cut='write' takes the value from all later positions: leave targets out, or use cut='read'")
    chosen = layer_list(model, layers)
    moving = {name: [i for i in chosen if name in model.block(i).branches] for name in ("mixer", "attn")}
    for i in moving["mixer"]:
        if not model.mixer(i).moves_values:
            raise ValueError(f"the {model.mixer(i).title} of layer {i} has no linear form: leave it out of layers")
    sources, targets = kept(sources), kept(targets)
    with ExitStack() as stack:
        if moving["mixer"]:
            cells = (sources, channel_list(model, channels, moving["mixer"][0]))
            stack.enter_context(cutting(model, Cut((cells,), targets, frozenset(moving["mixer"]), source, cut)))
        if moving["attn"] and channels is None:
            stack.enter_context(attention_knockout(model, sources, targets, moving["attn"]))
        yield model


@contextmanager
def cutting(model: Any, mine: Cut) -> Iterator[None]:
    """One cut in every forward pass inside the `with`."""
    chosen = sorted(mine.layers)
    mixers = {i: model.mixer(i) for i in chosen}
    names = [f"blocks.{i}.mixer.{site}" for i, mixer in mixers.items() for site in mixer.frozen_sites]
    memories: dict[int, Memory] = {}

    def call_of(layer: int) -> Pass:
        view, path, before = cache.scan_view(layer), cache.token_path(layer), columns_before(model)
        memory = memories[layer] if before else Memory()
        if before is not None:
            memories[layer] = memory
        return Pass(
            view, path, before, padded.padding, changes_in(model, layer, view.length, before, padded.padding), memory
        )

    def lose_reads(y: Tensor, hook: Any) -> Tensor:
        i = hook.layer()
        earlier = in_force(model, i, "read", mine)
        lost = lost_reads([*earlier, mine, *in_force(model, i, "write")], call_of(i), len(earlier))
        return y - lost.reshape(y.shape).to(y.dtype)

    def lose_writes(Bx: Tensor, hook: Any) -> Tensor:
        i = hook.layer()
        call = call_of(i)
        if mine.source == "scan":  # nothing is left there, to the last bit
            gone = call.cells(mine).expand(*Bx.shape[:2], call.path.p.shape[2])
            return Bx.masked_fill(gone.reshape(*Bx.shape[:-1], 1), 0)
        earlier = in_force(model, i, "write", mine)
        view = call.view
        lost = lost_writes([*earlier, mine], call, len(earlier)).reshape(view.u.shape).to(view.u.dtype)
        return Bx - view.write(lost).reshape(Bx.shape)

    place, edit = ("y", lose_reads) if mine.cut == "read" else ("write", lose_writes)
    hooks = [(f"blocks.{i}.mixer.{mixer.site_at(place)}", edit) for i, mixer in mixers.items()]
    with captured(model, names) as cache, padding_under_way(model) as padded, held(model, mine), model.hooks(hooks):
        yield


@torch.no_grad()
def knockout_sweep(
    model: Any,
    tokens: Tensor | str | Sequence[str],
    metric: Callable[[Tensor], Tensor],
    targets: Positions = -1,
    source: Source = "token",
    window: int = 1,
    positions: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    batch_size: int = 32,
    progress: bool = True,
) -> Float[Tensor, "window source *row"]:
    """The metric after cutting one source position from the targets, in each window of layers.

    Parameters
    ----------
    metric
        From logits b l V to one number (or one per row, which gives the result a last axis of rows).
    targets
        Positions that can no longer see the source; default: the last.
    window
        Layers that are cut together; row i cuts layers i to i + window - 1.
    positions
        Source positions; None: all.
    batch_size
        Rows of one forward pass: several sources run side by side.

    Returns
    -------
    Tensor
        n_layers - window + 1 rows, one column per source.

    Raises
    ------
    ValueError
        There are no positions, or the window is not between 1 and the number of layers.
    IndexError
        A position that does not exist.
    """
    n_layers = model.cfg.n_layers
    if not 1 <= window <= n_layers:
        raise ValueError(f"window must be from 1 to {n_layers} layers, got {window}")
    ids, found = model.input_to_tokens(tokens)
    attention_mask = found if attention_mask is None else attention_mask
    b, length = ids.shape
    wanted = range(length) if positions is None else positions
    if wrong := [t for t in wanted if not -length <= t < length]:
        raise IndexError(f"position {wrong[0]} is out of range for {length} positions")
    padded = None if attention_mask is None else Padding.from_mask(attention_mask, ids.shape, ids.device)
    columns = [position_mask(t, b, length, ids.device, padded) for t in wanted]
    at_once = max(1, batch_size // b)
    starts = range(n_layers - window + 1)
    results: list[Tensor] = []
    _, before = model.run_with_cache(
        ids, attention_mask=attention_mask, names_filter="blocks.*.hook_resid_pre", return_type=None
    )
    with tqdm(total=len(starts) * len(columns), disable=not progress, desc="knockout") as bar:
        for start in starts:
            for first in range(0, len(columns), at_once):
                now = columns[first : first + at_once]
                mask = torch.cat(now)
                padding = None if attention_mask is None else attention_mask.repeat(len(now), 1)
                with knockout(model, mask, targets, range(start, start + window), source):
                    logits = model(
                        before["resid_pre", start].repeat(len(now), 1, 1),
                        start_at_layer=start,
                        attention_mask=padding,
                        tokens=ids.repeat(len(now), 1),
                    )
                results += [torch.as_tensor(metric(one)) for one in logits.split(b)]
                bar.update(len(now))
    if not results:
        raise ValueError("there are no source positions to cut")
    stacked = torch.stack(results)
    return stacked.reshape(len(starts), len(columns), *stacked.shape[1:])
