"""Everything that processes share, on a tiny model: what one of them, or one alone, finds.

torchrun --nproc-per-node 2 -m tests.saes.many OUT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hooked_mamba import patching
from hooked_mamba.analysis.many_prompts import sweep_prompts
from hooked_mamba.world import torchrun
from saes import evaluate
from saes.explorer import collect
from saes.store import Capture, DataConfig, ShardReader, rows_of
from saes.store.shared import capture_shared
from tests.saes.models import mambacoder_on, sae_on, tiny

SITE = "blocks.1.mixer.hook_x"
FOLDERS = ("sweep", "activations", "evaluation/reconstruction", "evaluation/loss", "features")


def text(n: int = 40, length: int = 11) -> Tensor:
    """Tokens of the tiny model."""
    return torch.randint(2, 17, (n, length), generator=torch.Generator().manual_seed(3))


def everything(out: Path) -> dict[str, Any]:
    """A sweep, a capture, an evaluation and a collection, each in pieces."""
    model, tokens = tiny(), text()
    coders = {"sae": sae_on(model, SITE), "block": mambacoder_on(model, 0)}

    def metric(logits: Tensor, i: int) -> Tensor:
        return logits[0, -1, int(tokens[i, 0])]

    sweep = sweep_prompts(
        model, patching.get_act_patch_resid_pre, tokens[:10], tokens[10:20], metric, out / "sweep",
        prompts_per_piece=2, progress=False,
    )  # fmt: skip
    capture = Capture(model, [SITE], positions_per_row=4)
    rows = rows_of(tokens, model, DataConfig(context_length=11, epochs=1))
    store = capture_shared(capture, rows, out / "activations", 100, rows_per_shard=6, rows_per_pass=3, progress=False)
    reader = ShardReader(store)
    report = evaluate(
        model, coders, tokens, batch_size=4, batches_per_piece=2, folder=out / "evaluation", progress=False
    )
    features = collect(
        model, coders, tokens, n_tokens=300, rows_per_pass=3, passes_per_piece=2, folder=out / "features",
        context_length=11, top=3, sampled=4, before=3, after=2, progress=False,
    )  # fmt: skip
    return {
        "sweep": sweep,
        "activations": torch.cat([reader.read(i)[SITE] for i in range(len(reader.shards))]),
        "report": report.to_dict(),
        **{f"{name}/{field}": value for name, one in features.items() for field, value in vars(one).items()},
    }


def complete(out: Path) -> bool:
    """Whether every part is."""
    return all((out / name / "manifest.json").exists() for name in FOLDERS)


def equal(a: Any, b: Any) -> bool:
    """Bit for bit."""
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if hasattr(a, "__dataclass_fields__"):
        return equal(vars(a), vars(b))
    return bool(a == b)


if __name__ == "__main__":
    with torchrun():
        everything(Path(sys.argv[1]))
