"""Merging adapters into the tensors of a checkpoint, under the names that its files have.

1. Read each adapter's config and keys; refuse what is not a plain LoRA.
2. Find each changed weight in the checkpoint. A weight that the adapter saved whole comes first, then its LoRA.
3. Where embedding and unembedding are one tensor and one of them was trained as a module of its own, make them two.
4. Make each weight when it is asked for, like every other.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hooked_mamba.loading.adapters.changes import Changes, Lora, sort_keys, with_tokens
from hooked_mamba.loading.adapters.config import CONFIG, LoraConfig, read_config
from hooked_mamba.loading.adapters.experts import take_experts
from hooked_mamba.loading.tables import CheckpointError, LazyState, Place, some
from hooked_mamba.loading.tensor_files import open_bin, open_safetensors, read_json

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")

Adapter = str | Path | Sequence[str | Path]
"""A folder (or hub id) of one adapter, or several, merged in order."""

EMBEDDINGS = ("embeddings", "embedding", "embed_tokens")
HEAD = "lm_head.weight"
TIES = ("tie_embeddings", "tie_word_embeddings", "tie_embedding")
"""What configs call it that embedding and unembedding are one; LFM2's say the third, and some say two of them."""

_STEMS = ("", "backbone.", "model.", "model.language_model.", "language_model.", "model.backbone.")
"""What a stack's names begin with, in memory or in a file."""


def merge_adapters(
    config: Mapping[str, Any], weights: LazyState, adapters: Adapter, find: Callable[[str | Path], Path], tied: bool
) -> tuple[dict[str, Any], LazyState]:
    """A checkpoint's config and tensors with adapters merged.

    Parameters
    ----------
    config, weights
        As the checkpoint's files have them.
    adapters
        One or several; of several each is merged into what those before it made.
    find
        From an adapter's name to its folder.
    tied
        Whether unembedding and embedding are one.

    Returns
    -------
    tuple
        The config, which says that the embeddings are two where an adapter made them so, and the tensors.

    Raises
    ------
    CheckpointError
        What is no LoRA of this checkpoint.
    """
    config = dict(config)
    for name in [adapters] if isinstance(adapters, str | Path) else adapters:
        one = _open(find(name))
        if tied and one.parts_embeddings():
            embed = _embedding(weights)
            weights = weights if HEAD in weights else weights.with_copy(embed, HEAD)
            config = _untied(config)
            tied = False
        weights = one.merged_into(weights)
    return config, weights


def _open(folder: Path) -> _Opened:
    if not (folder / CONFIG).is_file():
        present = some(path.name for path in folder.iterdir()) or "nothing"
        raise CheckpointError(f"{folder} has no {CONFIG}; expected a folder that PEFT wrote, found {present}")
    about = read_config(read_json(folder / CONFIG), folder / CONFIG)
    path = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if path is None:
        present = some(path.name for path in folder.iterdir())
        raise CheckpointError(f"{folder} has no {WEIGHTS[0]}; found {present}")
    tensors = open_safetensors(path) if path.suffix == ".safetensors" else open_bin(path)
    return _Opened(path, about, tensors, sort_keys(tensors, str(path)))


@dataclass(frozen=True)
class _Opened:
    """An adapter's files."""

    path: Path
    about: LoraConfig
    tensors: LazyState
    changes: Changes

    def merged_into(self, weights: LazyState) -> LazyState:
        """The checkpoint's tensors, those that the adapter changes merged when they are read."""
        parts, where = {module: dict(keys) for module, keys in self.changes.parts.items()}, str(self.path)
        made: dict[str, Callable[[], Tensor]] = {}
        for name, key in self.changes.whole.items():
            theirs = self._name_of(name, weights, key)
            made[theirs] = self._whole(key, theirs, weights)
        experts = take_experts(parts, self.about, self.tensors, where)
        for module, keys in parts.items():
            if (tokens := keys.pop("token_adapter.trainable_tokens_delta", None)) is not None:
                self._change(made, weights, f"{module}.weight", tokens, self._rows(tokens, module))
            if not keys:
                continue
            lora = Lora(module, self.about, self.tensors, keys, where)
            lora.check()
            key = next(iter(keys.values()))
            if self.about.targets(module) is False:
                raise CheckpointError(f"{key} in {where} changes a module that {self.about.file} does not mean")
            self._change(made, weights, f"{module}.weight", key, lora.weight)
            if "lora_B.bias" in keys:
                self._change(made, weights, f"{module}.bias", keys["lora_B.bias"], lora.bias)
        for expert in experts:
            for name, change in expert.changes(weights, lambda name: _find(name, weights)):
                self._change(made, weights, name, expert.keys["lora_A.weight"], change)
        self._check_all_there(parts, weights)
        self._warn_of_sleepers(parts)
        getters = {name: made.get(name) or weights.getter(name) for name in weights} | made
        places = {name: weights.place(name) for name in weights}
        for name in made:
            at = weights.place(name)
            files = [*([at.file] if at.file else []), self.path.name]
            places[name] = Place(at.tensor, " with ".join(dict.fromkeys(files)), at.changed, at.rows)
        return LazyState(getters, places, weights.expected)

    def _change(
        self,
        made: dict[str, Callable[[], Tensor]],
        weights: LazyState,
        name: str,
        key: str,
        change: Callable[[Tensor, str], Tensor],
    ) -> None:
        """Put a change behind those that a weight has already."""
        theirs = self._name_of(name, weights, key)
        before, place = made.get(theirs) or weights.getter(theirs), str(weights.place(theirs))
        made[theirs] = lambda: change(before(), place)

    def _rows(self, key: str, module: str) -> Callable[[Tensor, str], Tensor]:
        given = self.about.trainable_token_indices
        if isinstance(given, Mapping):
            ids = next((ids for name, ids in given.items() if module == name or module.endswith(f".{name}")), ())
        else:
            ids = given
        return lambda base, place: with_tokens(base, self.tensors[key], tuple(ids), f"{key} in {self.path}")

    def _whole(self, key: str, name: str, weights: LazyState) -> Callable[[], Tensor]:
        def read() -> Tensor:
            given, there = self.tensors[key], weights[name]
            if given.shape != there.shape:
                raise CheckpointError(
                    f"{key} in {self.path} has shape {tuple(given.shape)}, and the checkpoint's {name} has"
                    f" {tuple(there.shape)}: save the merged model with PEFT if the adapter resized it"
                )
            return given

        return read

    def _name_of(self, name: str, weights: LazyState, key: str) -> str:
        """The checkpoint's name of a weight that PEFT calls by its name in memory."""
        found = _find(name, weights)
        if found is None:
            near = [other for other in weights if other.split(".")[-2:] == name.split(".")[-2:]] or list(weights)
            raise CheckpointError(
                f"{key} in {self.path} changes {name}, which the checkpoint's files do not hold; they hold"
                f" {some(near)}."
                " If the base is the right one and its files have other names than transformers' objects, merge there"
                " and give the model to from_hf"
            )
        return found

    def _check_all_there(self, modules: Mapping[str, Any], weights: LazyState) -> None:
        """Refuse an adapter that lacks modules its config means: a part of it was lost."""
        ends = {_within_layer(module) for module in modules}
        missing = [
            module
            for name in weights
            if name.endswith(".weight")
            and _within_layer(module := _in_memory(name.removesuffix(".weight"), modules)) in ends
            and module not in modules
            and self.about.targets(module)
        ]
        if missing:
            raise CheckpointError(
                f"{self.path} has no lora_A and lora_B of {some(missing)}, which {self.about.file} means: a part of the"
                " adapter is missing"
            )

    def _warn_of_sleepers(self, modules: Mapping[str, Any]) -> None:
        """Say what transformers did not compute while the adapter was trained."""
        asleep = [module for module in modules if module.endswith(".dt_proj")]
        if asleep:
            warnings.warn(
                f"{self.path} has a LoRA on dt_proj ({len(asleep)} layers). transformers' Mamba mixers read that"
                " layer's weight and never call it, so the LoRA had no effect and no gradient there. Merged, as"
                " here and by merge_and_unload(), it acts, and the model is not the one that was trained; leave"
                " those keys out of the file if that one is meant",
                stacklevel=2,
            )

    def parts_embeddings(self) -> bool:
        """Whether an embedding and an unembedding that were one tensor are two afterwards: one of them was trained, as
        a module of its own. (Rows of single tokens are trained in both.)"""
        lora = [m for m, parts in self.changes.parts.items() if any(part.startswith("lora_") for part in parts)]
        changed = [*lora, *(weight.rpartition(".")[0] for weight in self.changes.whole)]
        return any(module.rpartition(".")[2] in (*EMBEDDINGS, "lm_head") for module in changed)


def _find(name: str, weights: LazyState) -> str | None:
    """The checkpoint's name of a weight, whatever its names begin with; None where it is not there."""
    bare = _without_stem(name)
    candidates = [name, *(stem + bare for stem in _STEMS)]
    for was, now in (("embeddings", "embedding"), ("embedding", "embeddings")):
        end = f"{was}.weight"
        candidates += [c.removesuffix(end) + f"{now}.weight" for c in candidates if f".{c}".endswith(f".{end}")]
    return next((candidate for candidate in candidates if candidate in weights), None)


def _without_stem(name: str) -> str:
    """A name behind the longest beginning of a stack that it has."""
    return next((name.removeprefix(stem) for stem in _STEMS[:0:-1] if name.startswith(stem)), name)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config that says that the unembedding is a tensor of its own, wherever it speaks of that."""
    said = {"tie_embeddings" if "d_model" in config else "tie_word_embeddings", *(n for n in TIES if n in config)}
    text = config.get("text_config")
    nested = {"text_config": _untied(text)} if isinstance(text, Mapping) else {}
    return {**config, **dict.fromkeys(said, False), **nested}


def _embedding(state: LazyState) -> str:
    found = [name for name in state if name.endswith(tuple(f"{name}.weight" for name in EMBEDDINGS))]
    if not found:
        raise CheckpointError(f"the checkpoint has no embedding among {some(state)}")
    return found[0]


def _within_layer(module: str) -> str:
    """A module's name behind the number of its layer."""
    parts = module.split(".")
    at = next((i for i, part in enumerate(parts) if part.isdecimal()), -1)
    return ".".join(parts[at + 1 :])


def _in_memory(module: str, modules: Mapping[str, Any]) -> str:
    """A checkpoint's module under the beginning that the adapter's names have."""
    bare = _without_stem(module)
    return next((stem + bare for stem in _STEMS if stem + bare in modules), module)
