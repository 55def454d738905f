"""Finding the site of a coder in a model, from what the coder's file calls it: `load_coder(name, model)`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hooked_mamba.hooks.names import unalias
from hooked_mamba.models import HookedModel
from saes.coder import SparseCoder
from saes.files.checks import CoderFileError
from saes.files.modules import BRANCHES, NORMS, OUT, TOP, ModulePath
from saes.files.sites import is_site
from saes.find import resolve
from saes.located import locate
from saes.naming import check_fits

SHOWN = 12
"""Candidates that an error lists."""


def load_coder(
    name: str | Path, model: HookedModel, subfolder: str | None = None, revision: str | None = None, **options: Any
) -> SparseCoder:
    """A coder by name, on its site in a model: the one that its file names, by our name or as a path of modules.

    Parameters
    ----------
    name, subfolder, revision
        As in :meth:`saes.SparseCoder.from_pretrained`.
    model
        The model that it is to be used on.
    options
        Those of :func:`saes.files.load`; `in_site` and `out_site` come before what the file says.

    Returns
    -------
    SparseCoder
        On the model's device.

    Raises
    ------
    CoderFileError
        The file names no site of this model: those that hold as many numbers are listed.
    ValueError
        The site has another width than the coder.
    """

    def place(found: object, width: int, option: str, where: Path) -> str:
        return find_site(found, width, option, where, model)

    path = resolve(name, subfolder, revision)
    coder = SparseCoder.load(path, place=place, **options).to(model.device)
    check_fits(coder, model, str(name))
    return coder


def find_site(found: object, width: int, option: str, where: Path, model: HookedModel) -> str:
    """The site of a model that a file means.

    Parameters
    ----------
    found
        What the file says: a site's name, a path of modules, or None.
    width
        Numbers that it must hold.
    option
        "in_site" or "out_site", for the error.

    Raises
    ------
    CoderFileError
        None or several, with those that it may be.
    """
    if is_site(found) and unalias(str(found)) in model.hook_dict:
        return unalias(str(found))
    path = ModulePath.parse(found)
    meant = [] if path is None else outputs(path, model)
    if len(meant) == 1 and locate(meant[0], model).width == width:
        return meant[0]
    if len(meant) > 1:
        raise CoderFileError(
            f"{where} names the module {found!r}, whose output is the sum of {' and '.join(meant)} in this model: that"
            f" sum is no site. If the coder is of one of them, give {option}="
        )
    fitting = sites_of_width(width, model, path.layer if path is not None else None)
    said = "does not say which site it is of" if found is None else f"names the site {found!r}"
    why = "" if found is None else ", which this model does not have with that width"
    more = f" and {len(fitting) - SHOWN} more" if fitting[SHOWN:] else ""
    there = f"sites that hold {width} numbers: {', '.join(fitting[:SHOWN])}{more}" if fitting else (
        f"no site of this model holds {width} numbers: the coder is of another model"
    )  # fmt: skip
    raise CoderFileError(f"{where} {said}{why}; give {option}=. {there}")


def outputs(path: ModulePath, model: HookedModel) -> list[str]:
    """Our sites that a module's output may be in this model."""
    if path.layer is None:
        site = TOP[path.parts[0]]
        scaled = site == "hook_embed" and model.embedding_multiplier not in (None, 1)  # ours is behind the factor
        return [] if scaled else [site]
    if path.layer >= model.cfg.n_layers:
        return []
    block, name = model.block(path.layer), f"blocks.{path.layer}."
    if not path.parts:
        return [f"{name}hook_resid_post"]
    first, *rest = path.parts
    if first in NORMS and not rest:
        there = not block.norm_after and f"{name}{NORMS[first]}.hook_out" in model.hook_dict
        return [f"{name}{NORMS[first]}.hook_out"] if there else []
    if path.parts == ("mixer", "in_proj"):  # under other names it may stand before a factor
        return [site for site in [f"{name}mixer.hook_in_proj"] if site in model.hook_dict]
    if first not in BRANCHES or rest[1:] or (rest and rest[0] not in OUT):
        return []
    here = [b for b in BRANCHES[first] if b in block.branches]
    if first == "feed_forward" and not rest and any(block.out_scales.get(b, 1) != 1 for b in here):
        return [name + block.written[b] for b in here]  # a factor that the module itself applies (Falcon-H1)
    return [f"{name}{b}.{block.branches[b].out_site}" for b in here]


def sites_of_width(width: int, model: HookedModel, layer: int | None) -> list[str]:
    """Sites whose values have so many numbers at a position, of one layer or, as patterns, of all."""
    found: dict[str, None] = {}
    for site in model.hook_dict:
        first, _, rest = site.partition(".")
        number, _, within = rest.partition(".")
        if layer is not None and (first != "blocks" or number != str(layer)):
            continue
        try:
            fits = locate(site, model).width == width
        except ValueError:  # no number for every position
            continue
        if fits:
            found[site if layer is not None or first != "blocks" else f"blocks.{{i}}.{within}"] = None
    return list(found)
