"""One of the processes of a training under torchrun; also what two of them are compared with.

torchrun --nproc-per-node 2 -m tests.saes.training.parallel OUT MODE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from saes.coder import SparseCoder
from saes.store import ActivationStore, Batch, EveryNth, MemoryBlocks
from saes.store.blocks import ModelBlocks
from saes.store.rows import DocumentRows
from saes.training import Trainer, World, torchrun
from tests.saes import many
from tests.saes.training import small

BATCH = 32


class Part(ActivationStore):
    """A store that gives each process its half of the double batch that one process would take."""

    def __init__(self, rank: int, world: int, streams: dict[str, int]) -> None:
        values = {name: torch.randn(1024, width, generator=_generator(name)) for name, width in streams.items()}
        super().__init__(MemoryBlocks(values), BATCH * 2)
        self.rank, self.world = rank, world

    def __next__(self) -> Batch:
        n = self.batch_size // self.world
        return {name: value[self.rank * n : self.rank * n + n] for name, value in super().__next__().items()}


def _generator(name: str) -> torch.Generator:
    return torch.Generator().manual_seed(sum(map(ord, name)))


def coders() -> dict[str, SparseCoder]:
    """Those whose latents do not depend on the rest of the batch."""
    return {name: coder for name, coder in small.coders().items() if name in ("topk", "jumprelu", "gated", "standard")}


def equal_halves(world: World) -> dict[str, SparseCoder]:
    """Steps on halves of one batch: must be the steps on the whole one."""
    named = coders()
    store = Part(world.rank, world.size, small.store(named).widths)
    config = small.config(steps=12, log_every=4, dead_after_tokens=200)
    trainer = Trainer(named, store, config)
    result = trainer.train()
    assert result.complete
    return named


def own_text(world: World, out: Path, resume: bool) -> dict[str, SparseCoder]:
    """Every process its own rows of the text, with checkpoints."""
    named = small.coders()
    blocks = small.store(named).blocks
    assert isinstance(blocks, ModelBlocks)
    rows = EveryNth(DocumentRows(small.documents(), 16), world.rank, world.size)
    store = ActivationStore(ModelBlocks(blocks.capture, rows, tokens=400, rows_per_pass=8), BATCH)
    config = small.config(steps=10, checkpoint_every=4, keep=9)
    trainer = Trainer(named, store, config, out=out)
    if resume and world.first:  # as if the processes had been killed after step 4
        import shutil

        shutil.rmtree(out / "checkpoints" / "step-00000008")
        shutil.rmtree(out / "checkpoints" / "step-00000010")
    world.wait()
    assert trainer.train(resume=resume).complete
    return named


def main(out: Path, mode: str) -> None:
    torch.set_num_threads(1)
    with torchrun() as world:
        assert world.size == int(os.environ["WORLD_SIZE"])
        named = equal_halves(world) if mode == "halves" else own_text(world, out / "run", mode == "resume")
        tensors = {f"{n}.{k}": v.contiguous() for n, coder in named.items() for k, v in coder.state_dict().items()}
        save_file(tensors, out / f"{mode}-{world.rank}.safetensors")
        if mode == "halves":  # to start two processes takes longer than what they do
            many.everything(out / "pieces")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
