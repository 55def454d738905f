"""The configuration of a sparse coder: frozen, validated and saved with its weights."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import hooked_mamba.models  # noqa: F401  # what is declared is known once every kind of branch is defined
from hooked_mamba.hooks.names import declared, is_declared, unalias
from hooked_mamba.names_elsewhere import SAE_LENS, import_advice
from saes.saelens_names import CONFIG, TOP, advice

Architecture = Literal["topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka", "abstopk", "groupmax"]

ARCHITECTURES: tuple[Architecture, ...] = ("topk", "batchtopk", "jumprelu", "standard", "gated", "matryoshka")
"""TopK (Gao et al. 2024, arXiv:2406.04093), BatchTopK (Bussmann et al. 2024, arXiv:2412.06410), JumpReLU (Rajamanoharan
et al. 2024, arXiv:2407.14435), standard ReLU with L1 (Bricken et al. 2023), gated (Rajamanoharan et al. 2024,
arXiv:2404.16014), Matryoshka BatchTopK (Bussmann et al. 2025, arXiv:2503.17547)."""

ONLY_READ: tuple[Architecture, ...] = ("abstopk", "groupmax")
"""Architectures of other libraries' files that are not trained here: AbsTopK (arXiv:2510.00404) of SAELens, and
sparsify's GroupMax."""

NEEDS_K: tuple[Architecture, ...] = ("topk", "batchtopk", "matryoshka")
"""Architectures whose number of active latents is set, not learned."""

_LAYER = re.compile(r"^blocks\.(0|[1-9][0-9]{0,3})\.")
"""The block of a site. Four digits are more than any model has, and one block has one name."""


def _near(wrong: object, right: tuple[str, ...] | list[str]) -> str:
    near = difflib.get_close_matches(str(wrong)[:200], list(right), n=1, cutoff=0.4)
    return f"; nearest: {near[0]!r}" if near else ""


def _check_site(field: str, name: str) -> None:
    too_long = isinstance(name, str) and len(name) > 200
    misplaced = not isinstance(name, str) or too_long or (name.startswith("blocks.") and not _LAYER.match(name))
    if misplaced or not is_declared(unalias(name)):
        shown = f"{name[:200]!r}..." if too_long else repr(name)
        near = "" if too_long else _near(str(name).rpartition(".")[2], [hook for _, hook in declared().rows])
        raise ValueError(f"{field} must be the full name of a hook site, got {shown}{near}")


def _check_choices(values: Mapping[str, Any]) -> None:
    choices: dict[str, tuple] = {
        "architecture": (*ARCHITECTURES, *ONLY_READ),
        "target": (None, "block", "local"),
        "reads": (None, "normalized", "resid"),
        "input_norm": ("none", "scale"),
        "skip": (True, False),
        "apply_b_dec_to_input": (None, True, False),
    }
    for name, right in choices.items():
        value = values.get(name, right[0])
        if not any(value is r or (isinstance(r, str) and value == r) for r in right):
            near = _near(value, [r for r in right if isinstance(r, str)])
            raise ValueError(f"{name} must be one of {', '.join(map(repr, right))}; got {value!r}{near}")


@dataclass(frozen=True, kw_only=True)
class CoderConfig:
    """A dictionary on one site (an SAE), or one that predicts a site from another (a MambaCoder)."""

    architecture: Architecture
    """Which activation function, and with it which loss."""
    in_site: str
    """Full name of the hook site that is read."""
    out_site: str
    """Full name of the site that is predicted; the same as `in_site` in an SAE."""
    d_in: int
    """Width of what is read."""
    d_out: int
    """Width of what is predicted."""
    d_sae: int
    """Number F of latents."""
    k: int | None = None
    """Active latents per example (topk), or per example on average (batchtopk, matryoshka)."""
    target: Literal["block", "local"] | None = None
    """What a MambaCoder predicts: the block's output without the residual, or the part of it that position t's own
    input gives through the frozen mixer."""
    reads: Literal["normalized", "resid"] | None = None
    """What a MambaCoder reads: the block's input after its norm, or before."""
    window: int = 1
    """Positions that are read, the last of them its own, side by side: `d_in` is as many times the width of `in_site`.
    Before a text begins they are zeros, as a causal convolution sees them."""
    skip: bool = False
    """Whether x W_skip is added to the prediction."""
    apply_b_dec_to_input: bool | None = None
    """Whether b_dec is subtracted from the input. None: in an SAE yes, in a MambaCoder no."""
    input_norm: Literal["none", "scale"] = "none"
    """`scale`: while it is trained, x and y are multiplied by one fitted constant each, so that mean |x|^2 = d_in.
    Saved coders have it folded into their weights, and say `none`."""
    matryoshka_widths: tuple[int, ...] | None = None
    """Widths of the nested dictionaries, ascending; the last is d_sae. None: d_sae / 16, / 4, / 2 and d_sae."""
    model_name: str | None = None
    """The model whose activations it was trained on."""
    model_hash: str | None = None
    """A hash of that model's weights."""

    def __post_init__(self) -> None:
        _check_choices({field.name: getattr(self, field.name) for field in dataclasses.fields(self)})
        for name in ("d_in", "d_out", "d_sae"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        _check_site("in_site", self.in_site)
        _check_site("out_site", self.out_site)
        self._check_kind()
        self._check_window()
        self._check_k()
        if self.apply_b_dec_to_input is None:
            object.__setattr__(self, "apply_b_dec_to_input", self.is_sae)
        if self.apply_b_dec_to_input and not self.is_sae:
            raise ValueError(
                "apply_b_dec_to_input is for SAEs: a MambaCoder's b_dec lies at another site than its input"
            )
        self._check_widths()

    def _check_kind(self) -> None:
        if self.is_sae:
            for name in ("target", "reads"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} is for MambaCoders; in_site and out_site are the same"
                    )
            if self.d_in != self.d_out:
                raise ValueError(f"an SAE predicts what it reads, but d_in={self.d_in} and d_out={self.d_out}")
        elif self.target is None or self.reads is None:
            raise ValueError(
                "a MambaCoder (in_site and out_site differ) needs target 'block' or 'local' and reads 'normalized' or"
                f" 'resid', got target={self.target!r}, reads={self.reads!r}"
            )

    def _check_window(self) -> None:
        if not isinstance(self.window, int) or isinstance(self.window, bool) or self.window < 1:
            raise ValueError(f"window must be a positive integer, got {self.window!r}")
        if self.window == 1:
            return
        if self.is_sae:
            raise ValueError(f"an SAE predicts what it reads at one position, so window must be 1; got {self.window}")
        if self.target == "local":
            raise ValueError(
                f"target 'local' is what position t's own input gives, so window must be 1; got {self.window}"
            )
        if self.d_in % self.window:
            raise ValueError(f"d_in must be a multiple of window={self.window}, got {self.d_in}")

    def _check_k(self) -> None:
        if self.architecture in (*NEEDS_K, *ONLY_READ):
            if not isinstance(self.k, int) or isinstance(self.k, bool) or not 1 <= self.k <= self.d_sae:
                raise ValueError(f"{self.architecture} needs k from 1 to d_sae={self.d_sae}, got {self.k!r}")
            if self.architecture == "groupmax" and self.d_sae % self.k:
                raise ValueError(f"groupmax needs a k that divides d_sae={self.d_sae}, got {self.k}")
        elif self.k is not None:
            raise ValueError(
                f"{self.architecture} learns how many latents are active, so k must be None; got {self.k!r}"
            )

    def _check_widths(self) -> None:
        widths = self.matryoshka_widths
        if self.architecture != "matryoshka":
            if widths is not None:
                raise ValueError(f"matryoshka_widths are for the matryoshka architecture, this is {self.architecture}")
            return
        if widths is None:
            widths = tuple(sorted({max(1, self.d_sae // part) for part in (16, 4, 2, 1)}))
        widths = tuple(widths)
        if not widths or list(widths) != sorted(set(widths)) or widths[0] < 1 or widths[-1] != self.d_sae:
            raise ValueError(f"matryoshka_widths must ascend to d_sae={self.d_sae}, got {widths}")
        object.__setattr__(self, "matryoshka_widths", widths)

    @property
    def is_sae(self) -> bool:
        """Whether it predicts what it reads."""
        return self.in_site == self.out_site

    @property
    def hook_name(self) -> str:
        """`in_site` under SAELens' name."""
        return self.in_site

    @property
    def hook_name_out(self) -> str:
        """`out_site` under SAELens' name."""
        return self.out_site

    def __getattr__(self, name: str) -> NoReturn:
        """Only for names that do not exist; for SAELens' fields the error says what they are here."""
        if name in CONFIG:
            raise AttributeError(advice(name, CONFIG))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def kind(self) -> Literal["sae", "mambacoder"]:
        """ "sae" or "mambacoder"."""
        return "sae" if self.is_sae else "mambacoder"

    @property
    def layer(self) -> int | None:
        """The block it reads from; None at a site outside the blocks."""
        found = _LAYER.match(self.in_site)
        return int(found[1]) if found else None

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CoderConfig:
        """Build from a plain mapping; an unknown key is an error that names the nearest field."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise ValueError(f"CoderConfig has no field {key!r}{_near(key, known)}")
        required = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in required if name not in values]
        if missing:
            raise ValueError(f"CoderConfig lacks {', '.join(missing)}")
        _check_choices(values)
        widths = values.get("matryoshka_widths")
        return cls(**{**values, "matryoshka_widths": None if widths is None else tuple(widths)})

    def to_dict(self) -> dict[str, Any]:
        """A plain mapping, fit for JSON, that :meth:`from_dict` reads back to an equal config."""
        values = dataclasses.asdict(self)
        widths = self.matryoshka_widths
        if self.window == 1:  # as files were before there were windows
            del values["window"]
        return {**values, "matryoshka_widths": None if widths is None else list(widths)}

    def replace(self, **changes: Any) -> CoderConfig:
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def sae_config(
    site: str, d: int, d_sae: int, *, architecture: Architecture = "topk", k: int | None = 32, **fields: Any
) -> CoderConfig:
    """The config of an SAE on a site of width d. `k` is used only by architectures that have one."""
    name = unalias(site)
    k = k if architecture in (*NEEDS_K, *ONLY_READ) else None
    return CoderConfig(
        architecture=architecture, in_site=name, out_site=name, d_in=d, d_out=d, d_sae=d_sae, k=k, **fields
    )


def mambacoder_config(
    layer: int,
    d_model: int,
    d_sae: int,
    *,
    architecture: Architecture = "batchtopk",
    k: int | None = 32,
    reads: Literal["normalized", "resid"] = "normalized",
    target: Literal["block", "local"] = "block",
    window: int = 1,
    **fields: Any,
) -> CoderConfig:
    """The config of a MambaCoder of one block: from its input, of as many positions as `window`, to its output without
    the residual."""
    site = {"normalized": "norm.hook_out", "resid": "hook_resid_pre"}.get(reads)
    if site is None:
        raise ValueError(f"reads must be 'normalized' or 'resid', got {reads!r}")
    return CoderConfig(
        architecture=architecture,
        in_site=f"blocks.{layer}.{site}",
        out_site=f"blocks.{layer}.mixer.hook_out_proj",
        d_in=window * d_model,
        d_out=d_model,
        d_sae=d_sae,
        k=k if architecture in (*NEEDS_K, *ONLY_READ) else None,
        reads=reads,
        target=target,
        window=window,
        **fields,
    )


__getattr__ = import_advice(__name__, TOP, library=SAE_LENS)
