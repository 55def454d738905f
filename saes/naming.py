"""One coder, several, or several by name: normalised to one form and checked against the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import chain, count
from typing import Any

from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.config import CoderConfig
from saes.located import locate
from saes.options import near
from saes.targets import streams_of

Coders = SparseCoder | Sequence[SparseCoder] | Mapping[str, SparseCoder]
"""One, several, or several by name; those without a name get one from their site, see :func:`default_name`."""


def default_name(cfg: CoderConfig) -> str:
    """The name of an unnamed coder, from its site: "l1-out_proj", "l1-norm.out", "l1-mambacoder-local", and of one that
    reads a window from what it predicts: "l1-x-window4"."""
    where = "" if cfg.layer is None else f"l{cfg.layer}-"
    if cfg.window > 1:
        predicted = cfg.out_site.split(".", 2)[-1]
        return f"{where}{predicted.removeprefix('mixer.hook_').replace('hook_', '')}-window{cfg.window}"
    if not cfg.is_sae:
        branch = cfg.out_site.split(".", 2)[-1].removeprefix("hook_").removesuffix("_out").partition(".")[0]
        if branch in ("attn", "mlp", "moe"):
            return f"{where}{branch}-transcoder"
        return f"{where}mambacoder" + ("-local" if cfg.target == "local" else "")
    site = cfg.in_site if cfg.layer is None else cfg.in_site.split(".", 2)[2]
    return where + site.removeprefix("mixer.hook_").replace("hook_", "")


def full_name(cfg: CoderConfig) -> str:
    """With architecture and width, "l1-out_proj-topk-512": for places that may hold several coders of a site."""
    return f"{default_name(cfg)}-{cfg.architecture}-{cfg.d_sae}"


def unique_name(cfg: CoderConfig, taken: Collection[str]) -> str:
    """The default name, the full name, or the full name and a number: the first of these that is not taken."""
    numbered = (f"{full_name(cfg)}-{i}" for i in count(2))
    return next(name for name in chain([default_name(cfg), full_name(cfg)], numbered) if name not in taken)


def named_coders(coders: Coders) -> dict[str, SparseCoder]:
    """Coders by name; those without a name get one from their site, see :func:`unique_name`.

    Raises
    ------
    TypeError
        Anything but a coder is among them.
    ValueError
        If there are none.
    """
    if isinstance(coders, SparseCoder):
        coders = [coders]
    if not isinstance(coders, Mapping | Sequence) or isinstance(coders, str):
        raise TypeError(f"expected a coder, a list of coders or a mapping of them, got {type(coders).__name__}")
    if not coders:
        raise ValueError("there are no coders: the list is empty")
    for coder in coders.values() if isinstance(coders, Mapping) else coders:
        if not isinstance(coder, SparseCoder):
            raise TypeError(f"expected coders (SAE, MambaCoder), got {type(coder).__name__} among them")
    if isinstance(coders, Mapping):
        return dict(coders)
    named: dict[str, SparseCoder] = {}
    for coder in coders:
        named[unique_name(coder.cfg, named)] = coder
    return named


def check_fits(coder: SparseCoder, model: HookedModel, name: str) -> tuple[str, str]:
    """The streams that a coder reads and predicts, if it can sit on this model.

    Raises
    ------
    HookNameError
        If the model has no such site.
    ValueError
        If the site has another width, or the coder is on another device.
    """
    streams = streams_of(coder.cfg)
    for stream, width in zip(streams, (coder.cfg.d_in, coder.cfg.d_out), strict=True):
        there = locate(stream, model).width
        if there != width:
            raise ValueError(f"{name} holds {width} numbers per position, and {stream} of this model holds {there}")
    if coder.W_dec.device != model.device:
        raise ValueError(f"{name} is on {coder.W_dec.device} and the model on {model.device}: move one of them")
    return streams


def pick(named: Mapping[str, Any], name: str | None) -> str:
    """An existing name; None means the only one.

    Raises
    ------
    KeyError
        An unknown name, or no name although there are several.
    """
    if name is None:
        if len(named) == 1:
            return next(iter(named))
        raise KeyError(f"there are several coders, name one of {', '.join(named)}")
    if name not in named:
        raise KeyError(f"no coder is called {name!r}{near(name, list(named))}")
    return name
