"""Running the scan of a delta rule through the hooks on its state, writes and recalled values.

    S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + v_t k_t^T        recall_t = S_{t-1} a_t        y_t = S_t r_t

- `hook_h.{t}`, closed loop: the edit is carried forward, and later removals read the edited state.
- `hook_h`: an edit changes what is read out, not later states.
- writes edited: S_t = S_{t-1} (diag(w_t) + a_t b_t^T) + the returned write.
- recall edited, open loop: S_t = S_{t-1} diag(w_t) + recall'_t b_t^T + the write, with the returned values as given.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba import ops
from hooked_mamba.components import at_least_fp32
from hooked_mamba.documents import Documents
from hooked_mamba.hooks.points import LazyHookPoint, StateHookPoint
from hooked_mamba.mixers.states import (
    all_states_through_hooks,
    emptied,
    linear_scan_through_hooks,
    scan_through_hooks,
)
from hooked_mamba.ops.interface import ScanOut, StateEdits


class DeltaInputs(NamedTuple):
    """What `ops.delta_scan` reads."""

    r: Float[Tensor, "b l H K"]
    w: Float[Tensor, "b l H W"]
    k: Float[Tensor, "b l H K"]
    v: Float[Tensor, "b l H V"]
    a: Float[Tensor, "b l H K"]
    b: Float[Tensor, "b l H B"]
    """Or one number per head, which stands for that multiple of k."""

    def at(self, t: slice) -> DeltaInputs:
        """Some columns."""
        return DeltaInputs(*(part[:, t] for part in self))

    def write_at(self, t: list[int] | slice) -> Float[Tensor, "b s H V K"]:
        """v k^T, float32 at least, as the state is."""
        return at_least_fp32(self.v[:, t]).unsqueeze(-1) * self.k[:, t].unsqueeze(-2)

    def read_out(self, S: Float[Tensor, "b s H V K"], t: list[int] | slice) -> Float[Tensor, "b s H V"]:
        """S r."""
        return torch.einsum("bshvk,bshk->bshv", S, self.r[:, t].to(S.dtype)).to(self.v.dtype)


def delta_scan_through_hooks(
    x: DeltaInputs,
    h0: Float[Tensor, "b H V K"] | None,
    hook_h: StateHookPoint,
    writes: LazyHookPoint | None = None,
) -> tuple[Float[Tensor, "b l H V"], Float[Tensor, "b H V K"], Float[Tensor, "b l H V"]]:
    """The closed loop, with hooks on states and, if they are v k^T, on writes; returns y, the last state and what was
    recalled."""
    length = x.v.shape[1]
    recalled: list[Tensor] = []
    added: Tensor | None = None
    if writes is not None and writes.edited:
        usual = x.write_at(slice(None))
        added = writes(usual) - usual
    elif writes is not None:
        writes.read(length, x.write_at)

    def scan(t: slice, h: Tensor | None, states_at: list[int] | str | None) -> ScanOut:
        edits = None if added is None else StateEdits(range(t.stop - t.start), add=added[:, t])
        out = ops.delta_scan(*x.at(t), h0=h, states_at=states_at, edits=edits)
        recalled.append(out.recall)
        return ScanOut(out.y, out.h_last, out.states)

    if hook_h.edited:

        def states_of(t: slice, h: Tensor | None) -> Tensor:
            states = scan(t, h, "all").states
            assert states is not None  # they were asked for
            return states

        S, h = all_states_through_hooks(hook_h, length, h0, states_of)
        y = x.read_out(hook_h(S), slice(None))
    else:
        y, h = scan_through_hooks(hook_h, length, h0, scan, x.read_out)
    return y, h, torch.cat(recalled, 1)


def closed_loop_recall(
    x: DeltaInputs, h0: Float[Tensor, "b H V K"] | None, documents: Documents | None
) -> Float[Tensor, "b l H V"]:
    """What the scan recalls at every position, without hooks."""
    length = x.v.shape[1]
    resets = {} if documents is None else documents.ends()
    recalled, h, start = [], h0, 0
    for end in sorted({*resets, length - 1}):
        out = ops.delta_scan(*x.at(slice(start, end + 1)), h0=h)
        recalled.append(out.recall)
        h = emptied(out.h_last, resets[end]) if end in resets else out.h_last
        start = end + 1
    return torch.cat(recalled, 1)


def given_recall_through_hooks(
    x: DeltaInputs,
    recall: Float[Tensor, "b l H V"] | None,
    h0: Float[Tensor, "b H V K"] | None,
    hook_h: StateHookPoint,
    writes: LazyHookPoint,
) -> tuple[Float[Tensor, "b l H V"], Float[Tensor, "b H V K"]]:
    """The open loop over given recalls (None: the write has them in it already): a plain linear scan."""
    everything = slice(None)
    write = x.write_at(everything)
    write = writes(write) if writes.wanted else write
    added = write if recall is None else write + recall.unsqueeze(-1) * x.b.unsqueeze(-2)
    S, last = linear_scan_through_hooks(hook_h, x.w.unsqueeze(-2), added, h0)
    S = hook_h(S) if hook_h.wanted else S
    return x.read_out(S, everything), last
