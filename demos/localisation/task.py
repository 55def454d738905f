"""The two tasks: prompts whose answer stands at a known position, and what to train on."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from demos.tinystories.checkpoint import write_atomically
from hooked_mamba.analysis import tasks
from hooked_mamba.analysis.tasks import Drill, Prompts

NAMES = ("recall", "induction")
SIZES = {"recall": 8, "induction": 16}
"""What a task's size is unless said otherwise."""
SMALLEST = {"recall": 2, "induction": 4}
"""The size that training starts with."""
FILE = "task.json"


@dataclass(frozen=True)
class Task:
    """One task at one size."""

    name: str
    """recall: key value key value ... key, which value followed that key?
    induction: different tokens, then one of them again, what followed it?"""
    size: int
    """recall: pairs of a prompt, which is 2 size + 1 tokens long. induction: the prompt's length."""
    vocab: int = 32
    """Tokens; in recall the lower half are keys and the upper half values."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"the task must be one of {', '.join(NAMES)}, got {self.name!r}")
        if self.name == "recall" and self.vocab % 2:
            raise ValueError(f"recall needs as many keys as values, {self.vocab} tokens do not halve")
        if self.size < SMALLEST[self.name]:
            raise ValueError(f"{self.name} starts at size {SMALLEST[self.name]}, got {self.size}")
        renamed = 2 * (2 * self.size if self.name == "recall" else self.size - 1)
        if self.vocab < renamed:
            raise ValueError(f"{self.name} of size {self.size} needs {renamed} tokens to rename all, got {self.vocab}")

    @property
    def length(self) -> int:
        """Tokens of a prompt."""
        return 2 * self.size + 1 if self.name == "recall" else self.size

    def prompts(self, n: int, seed: int) -> Prompts:
        """Prompts with one question."""
        if self.name == "recall":
            return tasks.associative_recall(n, self.size, self.vocab // 2, self.vocab // 2, seed)
        return tasks.induction(n, self.size, self.vocab, seed)

    def drill(self, n: int, questions: int, seed: int) -> Drill:
        """Sequences with many questions."""
        if self.name == "recall":
            return tasks.recall_drill(n, self.size, self.vocab // 2, self.vocab // 2, questions, seed)
        return tasks.induction_drill(n, self.size, self.vocab, questions, seed)

    def replaced(self, prompts: Prompts, seed: int) -> Prompts:
        """The same prompts but for the answer's token."""
        return tasks.replaced(prompts, self.vocab // 2 if self.name == "recall" else 0, self.vocab, seed)

    def renamed(self, prompts: Prompts, seed: int) -> Prompts:
        """Prompts of the same layout without one token in common."""
        return tasks.renamed(prompts, self.vocab, 2 if self.name == "recall" else 1, seed)

    def shuffled(self, prompts: Prompts, seed: int) -> Prompts:
        """The same tokens in another order, but for the keys of recall and the token that induction asks for."""
        place = torch.arange(self.length).expand(len(prompts), -1)
        keys = place % 2 == 0 if self.name == "recall" else place == prompts.where[:, None] - 1
        return tasks.shuffled(prompts, keys, seed)

    def words(self, tokens: list[int]) -> list[str]:
        """Tokens as labels: k3 a key and v3 a value of recall, t3 a token of induction."""
        half = self.vocab // 2
        if self.name == "recall":
            return [f"k{t}" if t < half else f"v{t - half}" for t in tokens]
        return [f"t{t}" for t in tokens]

    def save(self, folder: Path) -> None:
        """Write the task beside its model."""
        text = json.dumps({"name": self.name, "size": self.size, "vocab": self.vocab}, indent=2)
        write_atomically(folder / FILE, (text + "\n").encode())

    @classmethod
    def load(cls, folder: Path) -> Task:
        """Read what :meth:`save` wrote."""
        path = folder / FILE
        if not path.is_file():
            raise FileNotFoundError(f"{folder} has no {FILE}: train a model with `python -m demos.localisation.train`")
        return cls(**json.loads(path.read_text(encoding="utf-8")))
