"""What a coder reads and predicts: streams of one vector per position, all from one forward pass.

A *stream* is a hook site's value with its last axes flattened, `blocks.1.mixer.hook_out_proj`; a window of such values,
those of positions t-3 to t side by side at position t, `blocks.1.norm.hook_out@window4` (see `saes.windows`); or the
local part of a block's output, `blocks.1.mixer.hook_out_proj@local`, which is formed from several sites:

    local_t = W_o [G_t (C_t . B_bar_t + D) sigma_t kappa[K-1] W_x n_t]

It is what position t's own input n_t gives through the frozen mixer: the convolution's last tap, the scan's self term
alpha[t,t] and the skip D. All else that the frozen mixer adds reads earlier positions; biases belong to neither.

Glossary: n normalised residual; sigma = sigmoid(convolution's output); kappa taps of the convolution, K-1 the last;
G = SiLU(z), in Mamba-2 with the gated norm's weight and divisor (a frozen number); B_bar = dt B.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from hooked_mamba.activation_cache import ActivationCache
from hooked_mamba.frozen.places import norm_name
from hooked_mamba.hooks.names import split_state_point, unalias
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.mixers.base import Branch
from hooked_mamba.models import HookedModel
from saes.windows import Beginnings, windows

LOCAL = "@local"
"""What the name of a local stream ends in."""

_WINDOW = re.compile(r"^(?P<site>[^@]+)@window(?P<n>[1-9]\d*)$")
"""The name of a stream of windows."""


Sites = Mapping[str, Tensor] | ActivationCache
"""Values of hook sites by their full names."""


@runtime_checkable
class Coded(Protocol):
    """The fields of a coder's config that say what it reads and predicts."""

    @property
    def in_site(self) -> str: ...

    @property
    def out_site(self) -> str: ...

    @property
    def target(self) -> str | None: ...

    @property
    def window(self) -> int: ...


def window_of(stream: str) -> tuple[str, int]:
    """The stream that windows are made of, and how many positions each has; of any other stream itself and 1."""
    found = _WINDOW.match(stream)
    return (found["site"], int(found["n"])) if found else (stream, 1)


def streams_of(cfg: Coded) -> tuple[str, str]:
    """The names of what a coder reads and of what it predicts; equal for an SAE."""
    read = unalias(cfg.in_site) + (f"@window{cfg.window}" if cfg.window > 1 else "")
    predicted = unalias(cfg.out_site)
    return read, predicted + LOCAL if cfg.target == "local" else predicted


def read(cfg: Coded, values: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(x, y) of one coder from streams by name, as a store's batches hold them."""
    x, y = streams_of(cfg)
    for name in (x, y):
        if name not in values:
            raise KeyError(f"no stream {name!r} here; there are {', '.join(sorted(values))}")
    return values[x], values[y]


def all_streams(cfgs: Iterable[Coded]) -> list[str]:
    """Every stream that some coder needs, each once, in the order of asking."""
    return list(dict.fromkeys(name for cfg in cfgs for name in streams_of(cfg)))


def sites_of(stream: str, model: HookedModel) -> list[str]:
    """The hook sites that a stream is formed from.

    Raises
    ------
    HookNameError
        If the site does not exist.
    ValueError
        If a local part is asked of another site than a block's output, or one of token ids.
    """
    stream, _ = window_of(stream)
    if not stream.endswith(LOCAL):
        model.hook_point(stream)
        if split_state_point(stream) or stream == "hook_tokens":
            raise ValueError(f"{stream} does not have a value at every position, so no coder can read it")
        return [stream]
    site = stream.removesuffix(LOCAL)
    model.hook_point(site)
    _, prefix, branch = _branch(site, model)
    return [prefix + name for name in branch.frozen_sites]


def _branch(site: str, model: HookedModel) -> tuple[int, str, Branch]:
    """(layer, prefix of its sites, the branch) whose output a site is.

    Raises
    ------
    ValueError
        It is no such site, or the branch has no linear form.
    """
    name = SiteName.parse(site)
    branch = None if name.layer is None else model.block(name.layer).branches.get(name.place)
    if branch is None or branch.out_site != name.hook or not branch.frozen_sites:
        raise ValueError(f"only a block's output (blocks.{{i}}.mixer.hook_out_proj) has a local part, got {site!r}")
    assert name.layer is not None  # it has a branch
    return name.layer, site.removesuffix(name.hook), branch


def input_of(model: HookedModel, site: str) -> str:
    """The site of what a branch reads, from one of the branch's own sites: the stream behind its norm.

    Raises
    ------
    ValueError
        It is no site of a branch, or the branch reads the stream as it is.
    """
    layer, name, _ = _owner(model, site)
    if model.block(layer).norm_after:
        raise ValueError(f"block {layer} reads the stream as it is: its norms stand behind its branches")
    return f"blocks.{layer}.{norm_name(model, layer, name)}.hook_out"


def taps_of(model: HookedModel, site: str) -> int:
    """How many positions of its input a branch's convolution or token shift reads, from one of the branch's sites."""
    return _owner(model, site)[2].reach


def _owner(model: HookedModel, site: str) -> tuple[int, str, Branch]:
    """(layer, name, branch) that a site is within."""
    found = SiteName.parse(site)
    branches = {} if found.layer is None else model.block(found.layer).branches
    name = found.place.partition(".")[0]
    if found.layer is None or name not in branches:
        raise ValueError(f"a window is of what a branch reads, and {site} is no site of a branch (mixer, attn, ...)")
    return found.layer, name, branches[name]


def last_layer(sites: Iterable[str]) -> int | None:
    """The last block that must run for these sites; None where the final norm or the logits are among them."""
    layers = [_layer(site) for site in sites if site.startswith("blocks.")]
    if any(site.startswith("ln_final.") or site == "hook_logits" for site in sites):
        return None
    return max(layers, default=-1)


def stream_values(
    stream: str,
    cache: Sites,
    model: HookedModel,
    channels: list[int] | None = None,
    beginnings: Beginnings | None = None,
) -> Float[Tensor, "b l f"]:
    """A stream's values from cached sites.

    Parameters
    ----------
    stream
        Its name.
    cache
        The sites that :func:`sites_of` names, b l ...
    model
        For the weights of a local part.
    channels
        Entries of the first axis after the positions (channels, heads, groups) to keep, for a large site such as
        hook_h; None: all.
    beginnings
        Where the texts of the cached pass begin; only windows need it, and a cache of all positions.

    Raises
    ------
    ValueError
        Windows are asked for without it.
    """
    stream, window = window_of(stream)
    value = _own_part(stream.removesuffix(LOCAL), cache, model) if stream.endswith(LOCAL) else cache[stream]
    if channels is not None:
        value = value[:, :, channels]
    value = value.flatten(2)
    if window == 1:
        return value
    if beginnings is None:
        raise ValueError(f"windows of {stream} end where a text begins: say where that is, beginnings=")
    return windows(value, window, beginnings)[0]


def local_part(model: HookedModel, layer: int, cache: Sites) -> Float[Tensor, "b l d"]:
    """What every position's own input adds to a mixer's output through the frozen mixer, without biases.

    Parameters
    ----------
    model
        Whose weights to use.
    layer
        Block.
    cache
        Holds the mixer's sites, see :func:`sites_of`.

    Returns
    -------
    Tensor
        W_o [G (C . B_bar + D) sigma kappa[K-1] W_x n], b l d.
    """
    return _own_part(f"blocks.{layer}.mixer.{model.mixer(layer).out_site}", cache, model)


def _own_part(site: str, cache: Sites, model: HookedModel) -> Float[Tensor, "b l d"]:
    _, prefix, branch = _branch(site, model)
    return branch.own_part(lambda name: cache[prefix + name])


def _layer(site: str) -> int:
    layer = SiteName.parse(site).layer
    assert layer is not None  # only sites in blocks come here
    return layer
