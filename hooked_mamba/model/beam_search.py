"""Beam search: the likeliest continuation found by several beams per row.

1. All beams' next tokens are ranked together, by the log-probability of the whole continuation.
2. Of the best, those that end are set aside with the score log-probability / length^length_penalty; the best others
continue, each from the state of its beam (`ModelState.rows`).
3. A row is done when its best running beam would score less than the worst of `num_beams` ended ones.

The rules are transformers' with `early_stopping=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_mamba.state import ModelState

Step = Callable[[Tensor, ModelState], tuple[Tensor, ModelState]]
"""(one token a beam n 1, memory before it) -> (logits behind it n V, memory after it)."""


@dataclass
class Rules:
    """Settings that apply to every row."""

    num_beams: int
    max_new_tokens: int
    stops: Sequence[int] = ()
    """Tokens that end a continuation."""
    length_penalty: float = 1.0
    """Exponent of the length by which a continuation's log-probability is divided."""

    @property
    def ranked(self) -> int:
        """Candidates considered: enough for `num_beams` to continue, however many end."""
        return max(2, 1 + len(self.stops)) * self.num_beams

    def score(self, log_prob: float, length: int) -> float:
        """The score by which finished continuations are compared."""
        return log_prob / length**self.length_penalty


@dataclass
class Beams:
    """The beams of one row."""

    log_probs: list[float] = field(default_factory=lambda: [0.0])
    tokens: list[list[int]] = field(default_factory=lambda: [[]])
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    """Scores and tokens, the best first, no more than `num_beams`."""
    open: bool = True
    """Whether a running beam may still come among the ended ones."""

    def advance(self, log_probs: Float[Tensor, "beam V"], rules: Rules) -> list[int]:
        """Take the next token, and return which beam each new one continues."""
        total = log_probs + log_probs.new_tensor(self.log_probs)[:, None]
        best, flat = total.flatten().topk(min(rules.ranked, total.numel()))
        parents: list[int] = []
        going: list[tuple[float, list[int]]] = []
        for rank, (log_prob, place) in enumerate(zip(best.tolist(), flat.tolist(), strict=True)):
            parent, token = divmod(place, total.shape[1])
            text = [*self.tokens[parent], token]
            if token in rules.stops or len(text) == rules.max_new_tokens:
                if rank < rules.num_beams and self.open:
                    self.ended.append((rules.score(log_prob, len(text)), text))
            elif len(going) < rules.num_beams:
                parents.append(parent)
                going.append((log_prob, text))
        self.ended = sorted(self.ended, key=lambda one: -one[0])[: rules.num_beams]
        if going:
            self.log_probs, self.tokens = [p for p, _ in going], [text for _, text in going]
            best_running = rules.score(self.log_probs[0], len(self.tokens[0]))
            full = len(self.ended) == rules.num_beams
            self.open = self.open and not (full and best_running <= self.ended[-1][0])
        return parents

    def best(self) -> list[int]:
        """The continuation to return."""
        return self.ended[0][1] if self.ended else self.tokens[0]


def beam_search(step: Step, logits: Float[Tensor, "b V"], state: ModelState, rules: Rules) -> list[list[int]]:
    """The best continuation of each row, its end token included; `logits` and `state` are those after the prompt."""
    rows = [Beams() for _ in range(len(logits))]
    while True:
        log_probs = logits.float().log_softmax(-1)
        first, parents = 0, []
        for row in rows:
            width = len(row.tokens)
            parents += [first + parent for parent in row.advance(log_probs[first : first + width], rules)]
            first += width
        if not any(row.open for row in rows) or not parents:
            return [row.best() for row in rows]
        last = [text[-1] for row in rows for text in row.tokens]
        logits, state = step(torch.tensor(last, device=logits.device)[:, None], state.rows(parents))
