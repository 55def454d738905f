"""Does a checkpoint give the same model here and in transformers? Logits on bundled prompts, greedy tokens, and time.

1. Load the checkpoint here, read every prompt, continue the first one greedily, and free the model.
2. Do the same with transformers, from the same files. A format that transformers does not read is converted by `to_hf`,
as the report says.
3. Compare, in each precision that fits into memory.
"""

from __future__ import annotations

import gc
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from hooked_mamba.loading import load_checkpoint
from hooked_mamba.loading.shapes import only_shapes
from hooked_mamba.memory import available_bytes
from hooked_mamba.models import load_model

PROMPTS = (
    "The Eiffel Tower stands in the city of",
    "Once upon a time there was a little girl who lived in a village near the forest. Every day she",
    "def fibonacci(n):\n    if n < 2:\n        return n\n    return",
    "1, 1, 2, 3, 5, 8, 13, 21,",
    "Der Hund läuft über die Straße und",
)
"""What every checkpoint reads; one without a tokenizer reads random tokens."""

NEW_TOKENS = 20
"""Tokens of the greedy continuation that is compared."""

BOUNDS = {"float32": 1e-3, "float64": 1e-4}
"""Largest difference of logits, as a part of the largest logit, with which two models count as the same. transformers
computes some steps in float32 whatever the weights are, so float64 is no proof of every digit there."""

PACKAGES = ("hooked-mamba", "torch", "transformers", "numba", "triton", "mamba-ssm", "safetensors")


@dataclass(frozen=True)
class Comparison:
    """One precision."""

    dtype: str
    max_difference: float
    """Of logits, over all prompts and positions."""
    max_logit: float
    same_top: float
    """Share of positions with the same likeliest token."""
    same_continuation: bool
    """Whether both continue the first prompt greedily with the same tokens."""
    seconds_here: float
    """Median of a forward pass over the longest prompt."""
    seconds_transformers: float

    @property
    def agrees(self) -> bool:
        """Whether the logits differ by less than :data:`BOUNDS`."""
        return self.max_difference <= BOUNDS[self.dtype] * max(self.max_logit, 1.0)


@dataclass(frozen=True)
class Verification:
    """What was found for one checkpoint."""

    name: str
    revision: str | None
    family: str
    format: str
    """The checkpoint's."""
    reference: str
    """"files": transformers loaded the same files; "converted": it got our weights through `to_hf`."""
    parameters: int
    prompts: int
    """How many, of texts; 0: random tokens were read."""
    comparisons: tuple[Comparison, ...]
    left_out: dict[str, str]
    """Precision -> why it was not tried."""
    machine: str
    device: str
    threads: int
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether all that was compared agrees."""
        return all(found.agrees for found in self.comparisons)

    def to_json(self) -> str:
        """The whole result, to be sent in."""
        return json.dumps(asdict(self) | {"agrees": self.agrees}, indent=2, sort_keys=True) + "\n"


def verify(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str = "cpu",
    dtypes: Sequence[str] = ("float32", "float64"),
    repeats: int = 3,
) -> Verification:
    """Compare a checkpoint here with the same one in transformers.

    Parameters
    ----------
    name
        A hub id, a folder or a bundled name.
    dtypes
        Precisions; those whose weights do not fit into memory are skipped and reported.
    repeats
        Timed forward passes, after one warm-up.

    Raises
    ------
    ValueError
        An unknown precision, or none fits.
    """
    for dtype in dtypes:
        if dtype not in BOUNDS:
            raise ValueError(f"dtypes must be of {', '.join(BOUNDS)}, got {dtype!r}")
    checkpoint = load_checkpoint(name, revision=revision)
    with only_shapes():
        numbers = sum(_numel(value) for value in checkpoint.state_dict.values())
    room, comparisons, left_out, n_texts, converted = available_bytes(torch.device(device)), [], {}, 0, False
    for dtype in dtypes:
        needed = numbers * getattr(torch, dtype).itemsize
        if room is not None and needed * 1.3 > room:
            left_out[dtype] = f"{needed:,} bytes of weights do not fit into {room:,} bytes of free memory"
            continue
        model = load_model(name, revision=revision, dtype=dtype, device=device)
        prompts, n_texts = _prompts(model)
        ours = _read(model, prompts, repeats)
        del model  # one of the two is in memory at a time
        gc.collect()
        other = None if checkpoint.foreign else _from_files(checkpoint.folder)
        converted = other is None
        if other is None:
            other = load_model(name, revision=revision, dtype=dtype).to_hf()
        other = other.to(device=device, dtype=getattr(torch, dtype)).eval()
        theirs = _read(_logits_of(other), prompts, repeats)
        del other
        gc.collect()
        comparisons.append(_compare(dtype, ours, theirs))
    if not comparisons:
        raise ValueError(f"nothing was compared: {'; '.join(left_out.values()) or 'no precision was asked for'}")
    return Verification(
        name=checkpoint.cfg.model_name,
        revision=revision,
        family=checkpoint.family,
        format=checkpoint.format,
        reference="converted" if converted else "files",
        parameters=numbers,
        prompts=n_texts,
        comparisons=tuple(comparisons),
        left_out=left_out,
        machine=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        device=torch.cuda.get_device_name() if torch.device(device).type == "cuda" else device,
        threads=torch.get_num_threads(),
        versions=_versions(),
    )


@dataclass(frozen=True)
class _Reading:
    logits: list[Tensor]
    """Of each prompt, 1 l V."""
    continuation: list[int]
    seconds: float


def _prompts(model: Any) -> tuple[list[Tensor], int]:
    """Tokens to read, and how many texts they come from; random tokens without a tokenizer."""
    if model.tokenizer is not None:
        return [model.to_tokens(text) for text in PROMPTS], len(PROMPTS)
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randint(model.cfg.d_vocab, (1, length), generator=generator) for length in (9, 24, 17)]
    return [tokens.to(model.device) for tokens in drawn], 0


def _from_files(folder: Path) -> Any:
    """transformers' model of the same files, in floating point; None where it cannot read them."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        return model.dequantize() if getattr(model, "is_quantized", False) else model
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError):
        return None  # a format of the authors' own; quantised by a package that is not here, or has no way back


def _logits_of(model: Any) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids).logits


@torch.no_grad()
def _read(logits_of: Callable[[Tensor], Tensor], prompts: list[Tensor], repeats: int) -> _Reading:
    logits = [logits_of(ids).double().cpu() for ids in prompts]
    longest = max(prompts, key=lambda ids: ids.shape[1])
    times = []
    for _ in range(max(repeats, 1)):
        start = time.perf_counter()
        logits_of(longest)[0, -1, 0].item()  # an item waits for a GPU
        times.append(time.perf_counter() - start)
    ids = prompts[0]
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits_of(ids)[:, -1:].argmax(-1)], 1)
    return _Reading(logits, ids[0, prompts[0].shape[1] :].tolist(), median(times))


def _compare(dtype: str, ours: _Reading, theirs: _Reading) -> Comparison:
    pairs = list(zip(ours.logits, theirs.logits, strict=True))
    width = min(pairs[0][0].shape[-1], pairs[0][1].shape[-1])  # one of them may leave padding rows out
    same = torch.cat([(a[..., :width].argmax(-1) == b[..., :width].argmax(-1)).flatten() for a, b in pairs])
    return Comparison(
        dtype=dtype,
        max_difference=max(float((a[..., :width] - b[..., :width]).abs().max()) for a, b in pairs),
        max_logit=max(float(b[..., :width].abs().max()) for _, b in pairs),
        same_top=float(same.double().mean()),
        same_continuation=ours.continuation == theirs.continuation,
        seconds_here=ours.seconds,
        seconds_transformers=theirs.seconds,
    )


def _numel(value: Any) -> int:
    return int(torch.Size(value.shape).numel())


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
