"""The tensors of an adapter, sorted by the module they change, and the weight that each change makes.

    W' = W + s B A                                 LoRA (arXiv:2106.09685), s from the config
    W' = m (W + s B A) / |W + s B A|               DoRA (arXiv:2402.09353), the norm of each row; of an embedding,
                                                   whose A is r x V and B d x r, of each column
    b' = b + s b_B                                 lora_bias
    W'[tokens] = given                             trainable_token_indices
    W' = given                                     modules_to_save, bias="all" or "lora_only"

All in float64 and rounded once, to float32 or to the base's own wider format.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hooked_mamba.loading.adapters.config import WAY_OUT, LoraConfig
from hooked_mamba.loading.tables import CheckpointError, LazyState

PREFIX = "base_model.model."

_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_B\.bias|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector|token_adapter\.trainable_tokens_delta)"
)
_BASE = re.compile(r"\.(?:base_layer|token_adapter\.base_layer|modules_to_save)\.(?=\w+$)")
"""What stands between a module and a weight of its own that the adapter saved whole."""


@dataclass
class Changes:
    """What one adapter does, by names of modules and weights as PEFT calls them."""

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    """Module -> part of the method -> key in the file."""
    whole: dict[str, str] = field(default_factory=dict)
    """Weight -> key in the file."""


def sort_keys(tensors: LazyState, where: str) -> Changes:
    """Sort an adapter's keys.

    Raises
    ------
    CheckpointError
        A key that is no part of a LoRA and no weight, or no keys at all.
    """
    found = Changes()
    for key in tensors:
        name = key.removeprefix(PREFIX)
        part = name.removesuffix(".weight") if name.endswith("lora_magnitude_vector.weight") else name
        if match := _PART.fullmatch(part):
            found.parts.setdefault(match["module"], {})[match["part"]] = key
        elif ".lora_" in name or ".token_adapter." in name.replace(".token_adapter.base_layer.", ""):
            raise CheckpointError(
                f"{key} in {where} is no part of a LoRA as PEFT saves it; expected a key such as"
                f" {PREFIX}MODULE.lora_A.weight"
            )
        else:
            found.whole[_BASE.sub(".", name)] = key
    if not found.parts and not found.whole:
        raise CheckpointError(f"{where} holds no tensors")
    return found


@dataclass(frozen=True)
class Lora:
    """One module's change, which :meth:`weight` and :meth:`bias` apply."""

    module: str
    config: LoraConfig
    tensors: LazyState
    keys: Mapping[str, str]
    where: str

    def check(self) -> None:
        """Refuse factors that are not a pair, or whose rank is not the config's.

        Raises
        ------
        CheckpointError
            Naming the key.
        """
        names = ("lora_embedding_A", "lora_embedding_B") if self.embedding else ("lora_A.weight", "lora_B.weight")
        absent = [name for name in names if name not in self.keys]
        if absent:
            raise CheckpointError(
                f"{self.where} lacks {PREFIX}{self.module}.{absent[0]}, and has {', '.join(self.keys.values())}"
            )
        A, B = (self.tensors[self.keys[name]] for name in names)
        if A.ndim != 2 or B.ndim != 2:
            raise CheckpointError(
                f"{self.keys[names[0]]} in {self.where} has shape {tuple(A.shape)}: a LoRA of a convolution, which no"
                f" merging is defined for where channels are apart; expected a matrix. {WAY_OUT}"
            )
        rank = self.config.rank(self.module)
        if A.shape[0] != rank or B.shape[1] != rank:
            raise CheckpointError(
                f"{self.keys[names[0]]} and {names[1]} in {self.where} have shapes {tuple(A.shape)} and"
                f" {tuple(B.shape)}; expected rank {rank}, as {self.config.file} says"
            )
        if self.config.use_dora != ("lora_magnitude_vector" in self.keys):
            has = "has no" if self.config.use_dora else "has a"
            raise CheckpointError(
                f"{self.where} {has} {PREFIX}{self.module}.lora_magnitude_vector, and {self.config.file} says"
                f" use_dora={str(self.config.use_dora).lower()}"
            )

    @property
    def embedding(self) -> bool:
        return any(name.startswith("lora_embedding") for name in self.keys)

    def _get(self, part: str) -> Tensor:
        tensor = self.tensors[self.keys[part]]
        if not tensor.dtype.is_floating_point:
            raise CheckpointError(f"{self.keys[part]} in {self.where} is {tensor.dtype}; expected floating point")
        if not bool(tensor.isfinite().all()):
            raise CheckpointError(f"{self.keys[part]} in {self.where} has numbers that are not finite")
        return tensor.double()

    def weight(self, base: Tensor, place: str) -> Tensor:
        """The merged weight.

        Raises
        ------
        CheckpointError
            Factors of other sizes than the base weight.
        """
        if self.embedding:
            delta = (self._get("lora_embedding_B") @ self._get("lora_embedding_A")).t()
        else:
            delta = self._get("lora_B.weight") @ self._get("lora_A.weight")
        if delta.shape != base.shape:
            key = next(iter(self.keys.values()))
            raise CheckpointError(
                f"{key} in {self.where} makes a change of shape {tuple(delta.shape)}, and {place} has shape"
                f" {tuple(base.shape)}: this adapter is of another base model"
            )
        merged = base.double() + self.config.scale(self.module) * delta
        if self.config.use_dora:
            along = 0 if self.embedding else 1
            norm = merged.norm(dim=along, keepdim=True)
            magnitude = self._get("lora_magnitude_vector").reshape(-1)
            if magnitude.numel() != norm.numel():
                raise CheckpointError(
                    f"{self.keys['lora_magnitude_vector']} in {self.where} has {magnitude.numel()} numbers, expected"
                    f" {norm.numel()}"
                )
            merged = merged * (magnitude.reshape(norm.shape) / norm)
        return rounded(merged, base)

    def bias(self, base: Tensor, place: str) -> Tensor:
        """The merged bias."""
        given = self._get("lora_B.bias")
        if given.shape != base.shape:
            raise CheckpointError(
                f"{self.keys['lora_B.bias']} in {self.where} has shape {tuple(given.shape)}, and {place} has"
                f" {tuple(base.shape)}"
            )
        return rounded(base.double() + self.config.scale(self.module) * given, base)


def with_tokens(base: Tensor, rows: Tensor, ids: tuple[int, ...], what: str) -> Tensor:
    """An embedding with the rows of some tokens replaced.

    Raises
    ------
    CheckpointError
        Other numbers of rows and tokens, or tokens that are not there.
    """
    if rows.shape != (len(ids), base.shape[-1]) or not all(0 <= i < len(base) for i in ids):
        raise CheckpointError(
            f"{what} has shape {tuple(rows.shape)} for {len(ids)} trainable_token_indices of an embedding"
            f" {tuple(base.shape)}; expected a row for each, and ids below {len(base)}"
        )
    wide = base.double()
    wide[list(ids)] = rows.double()
    return rounded(wide, base)


def rounded(value: Tensor, base: Tensor) -> Tensor:
    """float64 as float32, or as the base's own format where that is wider."""
    return value.to(torch.promote_types(base.dtype, torch.float32))
