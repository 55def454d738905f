"""`adapter_config.json` of PEFT: what of it says how a LoRA is merged, and what is refused since it says otherwise."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hooked_mamba.loading.tables import CheckpointError

CONFIG = "adapter_config.json"

WAY_OUT = (
    "merge it with PEFT (PeftModel.from_pretrained(base, folder).merge_and_unload()) where PEFT can, and give the model"
    " to from_hf"
)

PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""Initial weights that leave the base as it is; all others (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) change it as well."""

READ = {
    "peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "init_lora_weights",
    "target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern",
    "trainable_token_indices", "target_parameters",
}  # fmt: skip
UNREAD = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "lora_dropout", "bias", "fan_in_fan_out", "lora_bias", "megatron_core", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "runtime_config", "ensure_weight_tying", "velora_config",
}  # fmt: skip
"""Fields of which the tensors say enough, or that shape only the training. (`fan_in_fan_out` is for layers that hold
their weight transposed, which no model here has; PEFT ignores it on others.)"""

REFUSED = {
    "alora_invocation_tokens": "acts only behind certain tokens (aLoRA), so that no one weight is the same",
    "arrow_config": "chooses among adapters token by token (Arrow)",
    "use_qalora": "sums its input in groups (QALoRA)",
    "use_bdlora": "has factors of blocks (BD-LoRA)",
    "monteclora_config": "draws its factors at random (MonteCLoRA)",
    "kasa_config": "changes the base weights as well (KaSA)",
    "layer_replication": "repeats layers of the base model",
    "megatron_config": "is of a model split over devices by Megatron",
}
"""Options whose merged weights are not base + scale B A -> what they do."""


@dataclass(frozen=True)
class LoraConfig:
    """How the tensors of a LoRA change the weights."""

    file: str
    peft_version: str | None = None
    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()
    layers_to_transform: tuple[int, ...] = ()
    layers_pattern: tuple[str, ...] = ()
    target_parameters: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] = ()

    @property
    def turned(self) -> bool | None:
        """Whether the sides of experts' factors are exchanged; None: the file does not say its release of PEFT."""
        found = re.match(r"(\d+)\.(\d+)", self.peft_version or "")
        return (int(found[1]), int(found[2])) < (0, 20) if found else None

    def rank(self, module: str) -> int:
        """r of a module: that of the first pattern which is the end of its name, else the config's."""
        return int(self.rank_pattern.get(_pattern(self.rank_pattern, module), self.r))

    def scale(self, module: str) -> float:
        """What multiplies B A: alpha / r, with `use_rslora` alpha / sqrt(r) (arXiv:2312.03732)."""
        alpha = self.alpha_pattern.get(_pattern(self.alpha_pattern, module), self.lora_alpha)
        r = self.rank(module)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def targets(self, module: str) -> bool | None:
        """Whether the config means a module; None: it does not say (a config of older PEFT, or "all-linear")."""
        if self.target_modules is None or self.target_modules == "all-linear":
            return None
        if _named(self.exclude_modules, module):
            return False
        if any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in self.modules_to_save):
            return False
        if isinstance(self.target_modules, str) or module in self.target_modules:
            return _named(self.target_modules, module)
        return _named(self.target_modules, module) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if not self.layers_to_transform:
            return True
        patterns = [rf"(?:^|.*?\.){name}\.(\d+)\." for name in self.layers_pattern] or [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, module))), None)
        return found is not None and int(found[1]) in self.layers_to_transform


def _named(names: str | tuple[str, ...], module: str) -> bool:
    """Whether a regular expression is a whole name, or one of several names its end."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _pattern(patterns: Mapping[str, Any], module: str) -> str:
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), module)


def read_config(values: Mapping[str, Any], path: Path) -> LoraConfig:
    """A LoRA's config.

    Raises
    ------
    CheckpointError
        Another method of PEFT, an option whose result is not base + scale B A, or a field of a wrong type.
    """
    kind = values.get("peft_type")
    if kind is None:
        raise CheckpointError(f"{path} has no peft_type; expected the adapter_config.json that PEFT writes")
    if kind != "LORA":
        raise CheckpointError(f"{path} has peft_type={kind!r}, and only 'LORA' is merged here: {WAY_OUT}")
    for name, what in REFUSED.items():
        if values.get(name):
            raise CheckpointError(f"{path} has {name}={_short(values[name])}: this adapter {what}. Instead, {WAY_OUT}")
    start = values.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        raise CheckpointError(
            f"{path} has init_lora_weights={start!r}, which changes the base weights too, and they are not in the"
            " folder: save it again with path_initial_model_for_weight_conversion= (PEFT), which makes it a plain"
            f" LoRA, or {WAY_OUT}"
        )
    strange = [n for n, v in values.items() if v and n not in READ | UNREAD | set(REFUSED) and not n.startswith("_")]
    if strange:
        raise CheckpointError(
            f"{path} has {strange[0]}={_short(values[strange[0]])}, which is not known here: {WAY_OUT}"
        )
    checked = _Fields(values, path)
    try:
        return LoraConfig(
            file=str(path),
            peft_version=str(values["peft_version"]) if values.get("peft_version") else None,
            r=checked.number("r", 8, int),
            lora_alpha=checked.number("lora_alpha", 8, float),
            use_rslora=checked.flag("use_rslora"),
            use_dora=checked.flag("use_dora"),
            rank_pattern=checked.patterns("rank_pattern", int),
            alpha_pattern=checked.patterns("alpha_pattern", float),
            target_modules=checked.names("target_modules", None),
            exclude_modules=checked.names("exclude_modules", ()) or (),
            modules_to_save=checked.listed("modules_to_save", str),
            layers_to_transform=checked.listed("layers_to_transform", int),
            layers_pattern=checked.listed("layers_pattern", str),
            target_parameters=checked.listed("target_parameters", str),
            trainable_token_indices=checked.tokens("trainable_token_indices"),
        )
    except re.error as error:
        raise CheckpointError(f"{path} has a pattern that is no regular expression: {error}") from None


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) < 80 else f"{shown[:77]}..."


class _Fields:
    """Fields of a file, their types checked."""

    def __init__(self, values: Mapping[str, Any], path: Path) -> None:
        self.values, self.path = values, path

    def refuse(self, name: str, expected: str) -> CheckpointError:
        return CheckpointError(f"{self.path} has {name}={_short(self.values[name])}, expected {expected}")

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if value not in (None, True, False):
            raise self.refuse(name, "true or false")
        return bool(value)

    def number(self, name: str, default: Any, kind: type) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if not _is_number(value, kind):
            raise self.refuse(name, "a number above 0")
        return value

    def patterns(self, name: str, kind: type) -> dict[str, Any]:
        value = self.values.get(name) or {}
        if not isinstance(value, dict) or not all(_is_number(number, kind) for number in value.values()):
            raise self.refuse(name, "positive numbers by module")
        for pattern in value:
            re.compile(pattern)
        return value

    def names(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            return default
        if isinstance(value, str):
            re.compile("" if value == "all-linear" else value)
            return value
        return self.listed(name, str)

    def listed(self, name: str, kind: type) -> tuple[Any, ...]:
        value = self.values.get(name)
        if value is None:
            return ()
        found = value if isinstance(value, list) else [value]
        if not all(isinstance(one, kind) and not isinstance(one, bool) for one in found):
            raise self.refuse(name, f"a list of {'names' if kind is str else 'numbers'}")
        return tuple(found)

    def tokens(self, name: str) -> Any:
        value = self.values.get(name)
        if not isinstance(value, dict):
            return self.listed(name, int)
        if not all(isinstance(ids, list) and all(isinstance(i, int) for i in ids) for ids in value.values()):
            raise self.refuse(name, "token ids, or lists of them by module")
        return {module: tuple(ids) for module, ids in value.items()}


def _is_number(value: Any, kind: type) -> bool:
    right = isinstance(value, int) if kind is int else isinstance(value, int | float)
    return right and not isinstance(value, bool) and 0 < value < math.inf
