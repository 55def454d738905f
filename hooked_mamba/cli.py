"""Models by name. The command line itself is `hooked_mamba_cli`."""

from __future__ import annotations

from typing import Any


def load_model(name: str, device: str = "cpu") -> Any:
    """A model of either family, told by its files."""
    from hooked_mamba.loading import load_checkpoint
    from hooked_mamba.models import HookedMamba, HookedMamba2

    family = load_checkpoint(name).family
    return (HookedMamba if family == HookedMamba.family else HookedMamba2).from_pretrained(name, device=device)
