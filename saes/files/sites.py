"""Other libraries' names of a place in a model, translated to our sites and to a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hooked_mamba.hooks.names import is_declared, unalias
from saes.config import CoderConfig
from saes.files.checks import TEXT, CoderFileError, Hints
from saes.files.modules import ModulePath

READS = {"norm.hook_out": "normalized", "hook_resid_pre": "resid"}
"""Where a MambaCoder reads, and what its config calls it."""

READS_BESIDE = READS | {"norm2.hook_out": "normalized", "hook_resid_mid": "resid"}
READS_BESIDE |= {f"{norm}.hook_normalized": "normalized" for norm in ("norm", "norm2")}
"""The same of a transcoder of another branch than the mixer, such as an MLP."""

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,3})\.(.+)")


def is_site(name: object) -> bool:
    """Whether it is the full name of a hook site, ours or one of those known from elsewhere."""
    if not isinstance(name, str) or len(name) > 200:
        return False
    if not is_declared(unalias(name)):
        return False
    return not name.startswith("blocks.") or _BLOCK.fullmatch(name) is not None


def _chosen(option: str, hints: Hints, found: object, width: int, where: Path) -> str:
    given = getattr(hints, option)
    if given is None and hints.place is not None:
        return hints.place(found, width, option, where)
    name = given if given is not None else found
    if is_site(name):
        return unalias(str(name))
    path = ModulePath.parse(found) if given is None else None
    site = None if path is None else path.site()
    if site is not None:
        return site
    said = f"{option}={given!r}" if given is not None else f"{where} names the site {found!r}"
    if path is not None:
        raise CoderFileError(
            f"{said}, a module that is not the same in all families; saes.load_coder(name, model) finds it in a model,"
            f" or give {option}= with a full name such as 'blocks.{path.layer}.mlp.hook_out' or"
            f" 'blocks.{path.layer}.moe.hook_out'"
        )
    raise CoderFileError(
        f"{said}, which no model here has; give {option}= with a full name such as 'blocks.0.hook_resid_post' or"
        " 'blocks.0.mixer.hook_out_proj', or saes.load_coder(name, model), which lists those that fit"
    )


def coder_config(
    hints: Hints,
    where: Path,
    *,
    transcoder: bool,
    found_in: object,
    found_out: object,
    found_model: object,
    **fields: Any,
) -> CoderConfig:
    """A config of what a foreign file says, completed by hints, which come first.

    Parameters
    ----------
    hints
        What the caller says.
    where
        The file, for messages.
    transcoder
        Whether what it predicts lies at another site than what it reads.
    found_in, found_out, found_model
        Sites and model named by the file, as far as it names any.
    fields
        All other fields of the config.
    """
    in_site = _chosen("in_site", hints, found_in, fields["d_in"], where)
    out_site = in_site
    if transcoder:
        out_site = _chosen("out_site", hints, found_out, fields["d_out"], where)
        block, out = _BLOCK.fullmatch(in_site), _BLOCK.fullmatch(out_site)
        of_mixer = out is not None and out[2].startswith(("mixer.", "hook_mixer_out"))
        known = READS if of_mixer else READS_BESIDE
        reads = hints.reads or (known.get(block[2]) if block else None)
        fields |= {"target": hints.target or "block", "reads": reads}
        if reads is None:
            kind = "a MambaCoder" if of_mixer else "a transcoder"
            raise CoderFileError(
                f"{where} reads {in_site}; {kind} reads {' or '.join(f'blocks.0.{name}' for name in known)}."
                " If it is one of these by another name, give in_site="
            )
    else:
        for name in ("out_site", "target", "reads"):
            value = getattr(hints, name)
            if value is not None and not (name == "out_site" and unalias(value) == in_site):
                raise CoderFileError(f"{name}={value!r} is for MambaCoders; {where} is an SAE on {in_site}")
    if isinstance(found_model, str) and len(found_model) > TEXT:
        raise CoderFileError(f"{where} has a model_name of {len(found_model):,} characters, expected at most {TEXT}")
    model = hints.model_name if hints.model_name is not None else found_model
    try:
        return CoderConfig(
            in_site=in_site, out_site=out_site, model_name=None if model is None else str(model), k=hints.k, **fields
        )
    except (ValueError, TypeError) as error:
        raise CoderFileError(f"{where}: {error}") from None
