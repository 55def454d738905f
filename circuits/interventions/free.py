"""Edits of the real model: everything behind them is recomputed, selection, gates and norms included."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from circuits.interventions.edits import Intervention, OfCoder, OfState, ScaleEmbedding, ScaleUnit, checked
from circuits.interventions.parts import by_coder, coders_change, cuts_of, factors, state_changes
from circuits.interventions.units import unit_hooks
from hooked_mamba.analysis.captured import Padded, padding_under_way
from hooked_mamba.analysis.columns import columns_before
from hooked_mamba.analysis.cuts import StateChange, held
from hooked_mamba.analysis.knockout import cutting
from hooked_mamba.components import at_least_fp32
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.rewriting import Rewrite, rewritten


@contextmanager
def intervened(model: HookedModel, edits: Intervention | Iterable[Intervention]) -> Iterator[HookedModel]:
    """Edits in every forward pass inside the `with`: `forward`, `run_with_cache`, `generate`.

    Layers run in order, so that each edit meets what those below it have left. In one layer: embeddings and states in
    the order of the list; cuts together, a pair that two of them cut being cut once, and of states as they are edited;
    a coder's latents in the order of the list, all from what it encodes in this pass, then its error; coders in the
    order of their first mention, each reading what those before it have left. Padding stays as it is.

    In `generate`, positions count from the prompt's first column and continue into the new text; what does not exist
    yet is edited once it is generated, and -1 is the newest column of every call. What is cut from a target stays cut:
    logits are those of a pass over the whole text with the same edits (but for negative positions).

    Parameters
    ----------
    model
        Its hooks are removed at the end, also after an exception.
    edits
        One or several, see `circuits.interventions.edits`.

    Raises
    ------
    TypeError, ValueError, IndexError
        Edits that do not fit the model, see :func:`checked`. Positions outside of the text say so when it runs.
    """
    listed = checked(model, edits)
    changes = [change for edit in listed if isinstance(edit, OfState) for change in state_changes(model, edit)]
    with ExitStack() as stack:
        padded = stack.enter_context(padding_under_way(model))
        hooks: list[tuple[str, Any]] = [
            ("hook_embed", _scaling(model, edit, padded)) for edit in listed if isinstance(edit, ScaleEmbedding)
        ]
        for edit in listed:
            if isinstance(edit, ScaleUnit):
                hooks += stack.enter_context(unit_hooks(model, edit, padded))
        for one in changes:
            site = model.mixer(one.layer).site_at("state")
            hooks.append((f"blocks.{one.layer}.mixer.{site}.{one.position}", _changing(one)))
        stack.enter_context(held(model, *changes))
        for cut in cuts_of(model, listed):
            stack.enter_context(cutting(model, cut))
        rewrites = [Rewrite(coder.cfg, _rewriting(model, coder, mine, padded)) for coder, mine in by_coder(listed)]
        stack.enter_context(rewritten(model, rewrites))
        stack.enter_context(model.hooks(hooks))
        yield model


def _scaling(model: HookedModel, edit: ScaleEmbedding, padded: Padded) -> Any:
    def scale(embed: Tensor, hook: HookPoint) -> Tensor:
        share = factors(edit.positions, edit.factor, embed[..., 0], columns_before(model), padded.padding)
        return embed * share.unsqueeze(-1)

    return scale


def _changing(change: StateChange) -> Any:
    def apply(h: Tensor, hook: HookPoint) -> Tensor:
        new = h.reshape(len(h), *change.scale.shape[:2], -1) * change.scale
        return (new if change.add is None else new + change.add).reshape(h.shape)

    return apply


def _rewriting(model: HookedModel, coder: SparseCoder, edits: list[OfCoder], padded: Padded) -> Any:
    def rewrite(x: Tensor, y: Tensor) -> Tensor:
        return at_least_fp32(y) + coders_change(coder, edits, x, y, columns_before(model), padded.padding)

    return rewrite
