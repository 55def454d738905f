"""Names of hook sites: full and short ones, filters, and helpful errors about wrong ones."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Sequence

from torch import nn

from hooked_mamba.sites import ALIASES

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""A name, a glob, a list of either, a predicate on names, or None."""

STATE_POINT = re.compile(r"^(?P<site>.+\.hook_h)\.(?P<t>-?\d+)$")
"""`blocks.3.mixer.hook_h.17`: the state right after position 17."""

_ELSEWHERE = re.compile(r"^(blocks\.[^.]+\.)(?:mixer\.)?(hook_\w+)((?:\.-?\d+)?)$")
_WITHOUT_MIXER = {"hook_conv", "hook_A_bar", "hook_B", "hook_B_bar", "hook_C", "hook_h", "hook_out_proj"}
"""Sites that MambaLens has right under the block, with the same meaning."""

_OUTSIDE_MIXER = {"resid_pre", "resid_mid", "resid_post"}
_TOP = {"tokens", "embed", "logits"}
_IN_NORMS = {"scale", "normalized", "out"}


class HookNameError(KeyError):
    """A name that no hook site has."""

    def __str__(self) -> str:  # KeyError would quote the message
        return str(self.args[0])


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Full name of a site from its short one, as in TransformerLens.

    ("dt", 3) -> blocks.3.mixer.hook_dt; ("resid_pre", 0) -> blocks.0.hook_resid_pre; ("embed") -> hook_embed;
    ("scale", 2) -> blocks.2.norm.hook_scale; ("scale", 2, "mixer.norm") for the gated norm; ("scale") -> the final
    norm's; ("h.4", 1) -> blocks.1.mixer.hook_h.4. Full names come back as they are.
    """
    if layer is None:
        match = re.match(r"^([A-Za-z_]+?)(\d+)$", name)  # "dt3", as TransformerLens allows
        if match:
            return get_act_name(match[1], int(match[2]), layer_type)
    if name.startswith(("blocks.", "ln_final.")) or (name.startswith("hook_") and layer is None):
        return name
    short = name.removeprefix("hook_")
    short = {"ssm_out": "out_proj", "logits": "logits"}.get(short, short)
    alias = ALIASES.get(f"hook_{short}")
    if short in _IN_NORMS:
        return f"ln_final.hook_{short}" if layer is None else f"blocks.{layer}.{layer_type or 'norm'}.hook_{short}"
    if short in _TOP or layer is None:
        return f"hook_{short}"
    if short in _OUTSIDE_MIXER:
        return f"blocks.{layer}.hook_{short}"
    if alias is not None:
        short = alias.rpartition("hook_")[2]
        if alias.startswith("norm."):
            return f"blocks.{layer}.norm.hook_{short}"
    return f"blocks.{layer}.{layer_type or 'mixer'}.hook_{short}"


def unalias(name: str) -> str:
    """A name used elsewhere (`blocks.0.hook_ssm_out`, `blocks.0.hook_h.4`) as ours; ours as they are."""
    match = _ELSEWHERE.match(name)
    if not match:
        return name
    block, site, t = match.groups()
    if site in ALIASES:
        site = ALIASES[site]
    elif "mixer." in name or site not in _WITHOUT_MIXER:
        return name
    return block + (site if "." in site else f"mixer.{site}") + t


def split_state_point(name: str) -> tuple[str, int] | None:
    """("blocks.3.mixer.hook_h", 17) of "blocks.3.mixer.hook_h.17"; None of any other name."""
    match = STATE_POINT.match(name)
    return (match["site"], int(match["t"])) if match else None


def match_names(names_filter: NamesFilter, names: Sequence[str]) -> list[str]:
    """The names that a filter chooses, in computing order; single states (`...hook_h.4`) behind the rest.

    Raises
    ------
    HookNameError
        If a name, a glob or a function fits no site.
    """
    if names_filter is None:
        return list(names)
    if isinstance(names_filter, nn.Module):  # a hook point is callable, but no predicate
        raise TypeError(f"a names_filter holds names, got the hook point {getattr(names_filter, 'name', names_filter)}")
    if callable(names_filter):
        found = [name for name in names if names_filter(name)]
        if not found:
            raise HookNameError(
                f"the function chose none of the {len(names)} sites, which have names such as"
                f" {', '.join([*names[:1], *names[-3:-1]])}; model.hook_dict lists them"
            )
        return found
    if isinstance(names_filter, str):
        names_filter = [names_filter]
    chosen: dict[str, None] = {}
    for pattern in names_filter:
        if not isinstance(pattern, str):
            raise TypeError(f"a names_filter holds names, got {type(pattern).__name__}: {pattern!r}")
        for name in _match_one(unalias(pattern), names):
            chosen[name] = None
    order = {name: i for i, name in enumerate(names)}
    return sorted(chosen, key=lambda name: order.get(name, len(order)))


def _match_one(pattern: str, names: Sequence[str]) -> list[str]:
    state = split_state_point(pattern)
    base, suffix = (state[0], f".{state[1]}") if state else (pattern, "")
    is_glob = any(c in base for c in "*?[")
    found = fnmatch.filter(names, base) if is_glob else [name for name in names if name == base]
    if not found:
        raise unknown_name(pattern, names)
    return [name + suffix for name in found]


def unknown_name(name: str, names: Sequence[str]) -> HookNameError:
    """The error for a name that does not exist, with the nearest ones."""
    same_site = [full for full in names if full.rpartition(".")[2] == name.rpartition(".")[2]]
    near = difflib.get_close_matches(name, [*same_site, *names], n=6, cutoff=0.5)
    layer = re.match(r"^blocks\.(\d+)\.", name)
    if layer and any(n.startswith(layer[0]) for n in names):  # rather a wrong site than a wrong layer
        tail = difflib.get_close_matches(name, [n for n in names if n.startswith(layer[0])], n=2, cutoff=0.5)
        same_site = [n for n in same_site if n.startswith(layer[0])]
        near = [*tail, *near]
    suggestions = list(dict.fromkeys([*same_site[:1], *near]))[:3]
    blocks = {n.split(".")[1] for n in names if n.startswith("blocks.")}
    hint = f"; nearest: {', '.join(suggestions)}" if suggestions else ""
    return HookNameError(
        f"no hook site is named {name!r}{hint}. The model has {len(names)} sites in {len(blocks)} blocks;"
        " model.hook_dict lists them"
    )
