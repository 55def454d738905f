"""Layers whose weights are read without calling the layer, and what makes that wrong.

An adapter (LoRA, PEFT), a torch hook or another `forward` changes what a layer computes, but not its `.weight`. Code
that reads weights asks here, so that none of these is silently ignored. A parametrisation
(`torch.nn.utils.parametrize`) is part of `.weight` and needs no care.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_PLAIN: set[Any] = {nn.Linear.forward, nn.Conv1d.forward}


def plain(cls: type[nn.Module]) -> type[nn.Module]:
    """Declare that a class computes exactly what its weight says."""
    _PLAIN.add(cls.forward)
    return cls


def what_is_on(layer: nn.Module) -> str | None:
    """What makes a layer compute something other than its weight says; None: nothing."""
    if "forward" in vars(layer):
        return "has another forward"
    if type(layer).forward not in _PLAIN:
        return f"is a {type(layer).__name__}"
    return "has a torch hook" if has_hook(layer) else None


def has_hook(module: nn.Module) -> bool:
    """Whether a torch hook (not one of a hook point) is on a module."""
    return any(getattr(module, kind) for kind in _HOOKS)


def has_no_hook(module: nn.Module, where: str) -> None:
    """Refuse a module whose result a torch hook may change, in code that computes with its weight alone."""
    if has_hook(module):
        raise ValueError(
            f"{where} ({type(module).__name__}) has a torch hook, which its weight does not show: use the hook points"
            " within it, or remove the hook"
        )


def weights_of(layer: nn.Module, where: str) -> tuple[Any, Tensor | None]:
    """Weight and bias of a layer that is not called.

    Parameters
    ----------
    where
        Its name, for the error.

    Raises
    ------
    ValueError
        An adapter, a torch hook or another forward is on it, which its weight does not show.
    """
    found = what_is_on(layer)
    if found is not None:
        raise ValueError(
            f"{where} {found}, which its weight does not show, and this needs the weight alone: merge the adapter into"
            " the weight (peft: merge_and_unload()), or remove the hook"
        )
    return layer.weight, getattr(layer, "bias", None)
