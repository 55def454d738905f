"""LoRAs on experts, which are one parameter in memory and many tensors in most files (`target_parameters` of PEFT).

    delta[e] = s B[:, :, e] A[e],    A: E r x in, read as E x r x in;    B: out x E r, read as out x r x E

PEFT wraps a module once for each of its parameters, and its keys say only how deep each wrapper is: which parameter a
pair of factors belongs to is told by their sizes. Before release 0.20 in and out were exchanged for these modules
(read in its code of 0.17 to 0.21); where neither `peft_version` nor the sizes tell, the file is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from torch import Tensor

from hooked_mamba.loading.adapters.changes import PREFIX, rounded
from hooked_mamba.loading.adapters.config import WAY_OUT, LoraConfig
from hooked_mamba.loading.tables import CheckpointError, LazyState

PARAMETERS = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("up_proj",), "down_proj": ("down_proj",)}
"""A parameter of all experts -> the tensors of one expert that stand one behind the other in it."""

Find = Callable[[str], str | None]
"""From a weight's name in memory to the checkpoint's; None where it has none."""


@dataclass(frozen=True)
class ExpertLora:
    """One pair of factors on one parameter of all experts."""

    module: str
    """The module's name in memory, without wrappers."""
    config: LoraConfig
    tensors: LazyState
    keys: Mapping[str, str]
    where: str

    def changes(self, weights: LazyState, find: Find) -> Iterator[tuple[str, Callable[[Tensor, str], Tensor]]]:
        """(weight of the checkpoint, what makes it of the base) for every expert.

        Raises
        ------
        CheckpointError
            Sizes that fit no parameter, or several.
        """
        parameter, names, turned = self._meant(weights, find)
        rank, scale = self.config.rank(f"{self.module}.{parameter}"), self.config.scale(f"{self.module}.{parameter}")
        rows = [0, *accumulate(len(weights[name]) for name in names[0])]
        for e, parts in enumerate(names):
            for name, start, stop in zip(parts, rows[:-1], rows[1:], strict=True):
                yield name, self._change(e, len(names), (start, stop), rank, scale, turned)

    def _meant(self, weights: LazyState, find: Find) -> tuple[str, list[list[str]], bool]:
        """The parameter, the tensors of each of its experts, and whether the factors' sides are the other way round."""
        A, B = (self.tensors[self.keys[f"lora_{part}.weight"]] for part in "AB")
        named = {name.rpartition(".")[2] for name in self.config.target_parameters}
        sides = (False, True) if self.config.turned is None else (self.config.turned,)
        fitting = []
        for parameter, parts in PARAMETERS.items():
            names = _experts(self.module, parts, find) if parameter in named else []
            if not names:
                continue
            shapes = [weights[name].shape for name in names[0]]
            out, into = sum(shape[0] for shape in shapes), shapes[0][1]
            pairs = len(names) * self.config.rank(f"{self.module}.{parameter}")
            for turned in sides:
                wanted = (pairs, out if turned else into), (into if turned else out, pairs)
                if (A.shape, B.shape) == wanted:
                    fitting.append((parameter, names, turned))
        if len(fitting) != 1:
            raise CheckpointError(
                f"{self.keys['lora_A.weight']} in {self.where} has shape {tuple(A.shape)} with B of {tuple(B.shape)},"
                f" which fits {len(fitting)} of {', '.join(sorted(named))} of the experts in the checkpoint, of"
                f" {self.config.file} with peft_version={self.config.peft_version!r}: {WAY_OUT}"
            )
        return fitting[0]

    def _change(
        self, e: int, count: int, rows: tuple[int, int], rank: int, scale: float, turned: bool
    ) -> Callable[[Tensor, str], Tensor]:
        def change(base: Tensor, place: str) -> Tensor:
            A, B = (self.tensors[self.keys[f"lora_{part}.weight"]].double() for part in "AB")
            delta = B.unflatten(1, (rank, count))[:, :, e] @ A.unflatten(0, (count, rank))[e]
            delta = (delta.t() if turned else delta)[rows[0] : rows[1]]
            if not bool(delta.isfinite().all()):
                raise CheckpointError(f"{self.keys['lora_A.weight']} in {self.where} has numbers that are not finite")
            return rounded(base.double() + scale * delta, base)

        return change


def take_experts(
    parts: dict[str, dict[str, str]], config: LoraConfig, tensors: LazyState, where: str
) -> list[ExpertLora]:
    """Take the factors on experts out of an adapter's parts.

    Raises
    ------
    CheckpointError
        Other parameters than experts', or a pair that is none.
    """
    found = []
    for wrapped in [module for module in parts if _bare(module).endswith(".experts")]:
        keys = parts.pop(wrapped)
        if set(keys) != {"lora_A.weight", "lora_B.weight"}:
            raise CheckpointError(
                f"{where} has {', '.join(keys.values())}; expected {PREFIX}{wrapped}.lora_A.weight and lora_B.weight"
            )
        found.append(ExpertLora(_bare(wrapped), config, tensors, keys, where))
    strange = [name for name in config.target_parameters if name.rpartition(".")[2] not in PARAMETERS]
    if strange or (config.target_parameters and not found):
        raise CheckpointError(
            f"{config.file} has target_parameters={list(config.target_parameters)}, and only experts' are merged here"
            f" ({', '.join(PARAMETERS)}): {WAY_OUT}"
        )
    return found


def _bare(module: str) -> str:
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    return module


def _experts(module: str, parts: tuple[str, ...], find: Find) -> list[list[str]]:
    """For each expert the checkpoint's tensors of a parameter; none where the file holds it otherwise."""
    names: list[list[str]] = []
    while True:
        here = [find(f"{module}.{len(names)}.{part}.weight") for part in parts]
        if None in here:
            return names
        names.append([name for name in here if name is not None])
