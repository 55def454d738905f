"""Names of hook sites: full and short ones, filters, and helpful errors about wrong ones.

What exists is read from the classes that declare sites (:mod:`hooked_mamba.hooks.sited`); a model knows its own names
and aliases, and :class:`~hooked_mamba.hooks.root.HookedRoot` asks it first.
"""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from torch import nn

from hooked_mamba.hooks.elsewhere import meant_by
from hooked_mamba.hooks.site import Site
from hooked_mamba.hooks.site_name import SiteName
from hooked_mamba.hooks.sited import DECLARED, aliases_of, rows_of

NamesFilter = str | Sequence[str] | Callable[[str], bool] | None
"""A name, a glob, a list of either, a predicate on names, or None."""

IN_NORMS = ("scale", "normalized", "out")
"""Short names that mean the block's norm, or without a layer the final norm, as in TransformerLens."""


OF_ATTENTION = ("hook_z",)
"""Sites whose short name means attention's, as in TransformerLens, although mixers have one of that name too: a mixer's
is ("mixer.z", 3)."""


class HookNameError(KeyError):
    """A name that no hook site has."""

    def __str__(self) -> str:  # KeyError would quote the message
        return str(self.args[0])


@dataclass(frozen=True)
class Declared:
    """What the classes defined so far declare, without a model."""

    rows: dict[tuple[str, str], Site]
    """(place, hook) -> row; places as in :class:`SiteName`."""
    top: frozenset[str]
    """Hooks outside of blocks and norms."""
    aliases: dict[str, str]
    """A name used elsewhere -> ours, both within a block: {"hook_ssm_input": "mixer.hook_x"}."""


def declared() -> Declared:
    """Every declared site and alias. A name that some class declares as a site is not an alias."""
    return _declared(len(DECLARED))


@lru_cache(maxsize=1)
def _declared(count: int) -> Declared:
    rows: dict[tuple[str, str], Site] = {}
    top: set[str] = set()
    for cls in DECLARED[:count]:
        prefix = "" if cls.place in ("", "block") else f"{cls.place}."
        for local, row in rows_of(cls):
            place, _, hook = f"{prefix}{local}".rpartition(".")
            rows.setdefault((place, hook), row)
            if cls.place == "" and not place:
                top.add(hook)
    own = {hook for _, hook in rows}
    aliases: dict[str, str] = {}
    for cls in DECLARED[:count]:
        prefix = "" if cls.place == "block" else f"{cls.place}."
        for name, ours in aliases_of(cls, prefix) if cls.place else ():
            right_under_the_block = ours == f"{prefix}{name}"
            if right_under_the_block or "." in name or name not in own:
                aliases.setdefault(name, ours)
    return Declared(rows, frozenset(top), aliases)


def is_declared(name: str) -> bool:
    """Whether some kind of model has a site of this full name."""
    site = SiteName.parse(name)
    return (site.place, site.hook) in declared().rows


def get_act_name(name: str, layer: int | str | None = None, layer_type: str | None = None) -> str:
    """Full name of a site from its short one, as in TransformerLens.

    ("dt", 3) -> blocks.3.mixer.hook_dt; ("resid_pre", 0) -> blocks.0.hook_resid_pre; ("embed") -> hook_embed;
    ("scale", 2) -> blocks.2.norm.hook_scale; ("scale", 2, "mixer.norm") for the gated norm; ("scale") -> the final
    norm's; ("h.4", 1) -> blocks.1.mixer.hook_h.4; ("z", 2) -> blocks.2.attn.hook_z; ("mixer.z", 2) for a mixer's own z.
    Full names come back as they are.
    """
    if layer is None:
        match = re.match(r"^([A-Za-z_]+?)(\d+)$", name)  # "dt3", as TransformerLens allows
        if match:
            return get_act_name(match[1], int(match[2]), layer_type)
    if name.startswith(("blocks.", "ln_final.")) or (name.startswith("hook_") and layer is None):
        return name
    short = name.removeprefix("hook_")
    if layer is None:
        return f"ln_final.hook_{short}" if short in IN_NORMS else f"hook_{short}"
    if names_its_branch(short):
        place, _, last = short.rpartition(".")
        return str(SiteName(str(layer), place, f"hook_{last.removeprefix('hook_')}", None))
    hook, _, t = f"hook_{short}".partition(".")
    site = SiteName(str(layer), "", hook, int(t) if t else None)
    if layer_type is not None:
        return str(site.at(layer_type, hook))
    if short in IN_NORMS:
        return str(site.at("norm", hook))
    known = declared()
    if hook in known.top:
        return hook
    if ("", hook) in known.rows:
        return str(site)
    if hook in OF_ATTENTION:
        return str(site.at("attn", hook))
    if hook in known.aliases:
        place, _, hook = known.aliases[hook].rpartition(".")
        return str(site.at(place, hook))
    places = (place for place, other in known.rows if other == hook and place and not place.endswith("norm"))
    return str(site.at(next(places, "mixer"), hook))


def names_its_branch(short: str) -> bool:
    """Whether a short name includes its branch, as "attn.z" does and "h.4" does not."""
    place, _, last = short.rpartition(".")
    return bool(place) and not last.removeprefix("-").isdigit()


def unalias(name: str) -> str:
    """An alias (`blocks.0.hook_ssm_out`, `blocks.0.hook_h.4`) as our own name; our names unchanged."""
    site = SiteName.parse(name)
    if site.block is None:
        return name
    known = declared().aliases
    local = f"{site.place}.{site.hook}" if site.place else site.hook
    ours = known.get(local)
    if ours is None and site.place == "mixer" and known.get(site.hook, "").startswith("mixer."):
        ours = known[site.hook]
    if ours is None or ours == local:
        return name
    place, _, hook = ours.rpartition(".")
    return str(site.at(place, hook))


def split_state_point(name: str) -> tuple[str, int] | None:
    """("blocks.3.mixer.hook_h", 17) of "blocks.3.mixer.hook_h.17"; None of any other name."""
    site = SiteName.parse(name)
    return None if site.t is None else (str(site.base), site.t)


def match_names(names_filter: NamesFilter, names: Sequence[str], resolve: Callable[[str], str] = unalias) -> list[str]:
    """The names that a filter matches, in order of computation; single states (`...hook_h.4`) come last.

    Raises
    ------
    HookNameError
        A name, a glob or a function matches no site.
    """
    if names_filter is None:
        return list(names)
    if isinstance(names_filter, nn.Module):  # a hook point is callable, but no predicate
        raise TypeError(f"a names_filter holds names, got the hook point {getattr(names_filter, 'name', names_filter)}")
    if callable(names_filter):
        found = [name for name in names if names_filter(name)]
        if not found:
            raise HookNameError(
                f"the function matched none of the {len(names)} sites, which have names such as"
                f" {', '.join([*names[:1], *names[-3:-1]])}; model.hook_dict lists them"
            )
        return found
    if isinstance(names_filter, str):
        names_filter = [names_filter]
    if not isinstance(names_filter, Iterable):
        raise TypeError(
            "a names_filter is a name, a glob such as 'blocks.*.mixer.hook_dt', a list of these, or a function of a"
            f" name: got {type(names_filter).__name__}: {names_filter!r}"
        )
    chosen: dict[str, None] = {}
    for pattern in names_filter:
        if not isinstance(pattern, str):
            raise TypeError(f"a names_filter holds names, got {type(pattern).__name__}: {pattern!r}")
        for name in _match_one(resolve(pattern), names):
            chosen[name] = None
    order = {name: i for i, name in enumerate(names)}
    return sorted(chosen, key=lambda name: order.get(name, len(order)))


def _match_one(pattern: str, names: Sequence[str]) -> list[str]:
    state = split_state_point(pattern)
    base, suffix = (state[0], f".{state[1]}") if state else (pattern, "")
    is_glob = any(c in base for c in "*?[")
    found = fnmatch.filter(names, base) if is_glob else [base] * (base in names)
    if not found:
        raise unknown_name(pattern, names)
    return [name + suffix for name in found]


def spelled_like(name: str, names: Sequence[str]) -> list[str]:
    """Up to three names whose last part is spelled most like that of a wrong name, the likeliest first, each where the
    whole is most alike; where there is none, names that are alike as a whole."""
    hooks: dict[str, list[str]] = {}
    for full in names:
        hooks.setdefault(full.rpartition(".")[2], []).append(full)
    near = difflib.get_close_matches(name.rpartition(".")[2], hooks, n=3, cutoff=0.7)
    whole = difflib.SequenceMatcher(b=name)

    def alike(full: str) -> float:
        whole.set_seq1(full)
        return whole.ratio()

    found = [max(hooks[hook], key=alike) for hook in near]
    return found or difflib.get_close_matches(name, names, n=3, cutoff=0.6)


def unknown_name(name: str, names: Sequence[str]) -> HookNameError:
    """The error for a name that does not exist, with the nearest ones."""
    block = SiteName.parse(name).block
    here = [n for n in names if SiteName.parse(n).block == block] if block is not None else []
    suggestions = spelled_like(name, here or names)  # rather a wrong site than a wrong layer
    blocks = {SiteName.parse(n).block for n in names} - {None}
    meant = meant_by(name, names, None if block is None or not here else f"blocks.{block}.")
    if meant is not None:
        suggestions = [meant[1]] if meant[1] else []
    hint = f"; nearest: {', '.join(suggestions)}" if suggestions else ""
    hint = f": {meant[0]}{hint}" if meant is not None else hint
    return HookNameError(
        f"no hook site is named {name!r}{hint}. The model has {len(names)} sites in {len(blocks)} blocks;"
        " model.hook_dict lists them"
    )
