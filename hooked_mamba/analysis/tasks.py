"""Synthetic tasks whose answers stand at known positions, for checking that tools point at the right place.

Every draw is decided by its seed. Tokens are plain numbers; no tokenizer is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor


@dataclass(frozen=True)
class Prompts:
    """Prompts that end in a question."""

    tokens: Int[Tensor, "b l"]
    """The question is the last token."""
    answers: Int[Tensor, " b"]
    """What should come next."""
    where: Int[Tensor, " b"]
    """The position that holds the answer."""

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def rows(self, chosen: Tensor) -> Prompts:
        """Some of them."""
        return Prompts(self.tokens[chosen], self.answers[chosen], self.where[chosen])


def associative_recall(n: int, pairs: int = 4, keys: int = 8, values: int = 8, seed: int = 0) -> Prompts:
    """Key value key value ... key: which value stood behind that key? (Arora et al. 2023, arXiv:2312.04927.)

    Parameters
    ----------
    n
        Prompts.
    pairs
        Different keys of a prompt; it is 2 pairs + 1 tokens long.
    keys, values
        Key tokens are 0 to keys - 1, value tokens keys to keys + values - 1; the values of a prompt differ.
    """
    if pairs > min(keys, values):
        raise ValueError(f"{pairs} pairs need as many different keys and values, there are {keys} and {values}")
    generator = torch.Generator().manual_seed(seed)
    key = torch.rand(n, keys, generator=generator).argsort(-1)[:, :pairs]
    value = torch.rand(n, values, generator=generator).argsort(-1)[:, :pairs] + keys
    asked = torch.randint(pairs, (n,), generator=generator)
    rows = torch.arange(n)
    body = torch.stack([key, value], -1).flatten(1)
    tokens = torch.cat([body, key[rows, asked, None]], 1)
    return Prompts(tokens, value[rows, asked], 2 * asked + 1)


def induction(n: int, length: int = 16, vocab: int = 24, seed: int = 0) -> Prompts:
    """Different tokens in random order, then one of them again: what followed it?

    Parameters
    ----------
    length
        Of a prompt, the question included.
    vocab
        Tokens 0 to vocab - 1, at least length - 1 of them.
    """
    if length < 3 or vocab < length - 1:
        raise ValueError(f"need length of 3 or more and vocab of length - 1 or more, got {length} and {vocab}")
    generator = torch.Generator().manual_seed(seed)
    body = torch.rand(n, vocab, generator=generator).argsort(-1)[:, : length - 1]
    asked = torch.randint(length - 2, (n,), generator=generator)
    rows = torch.arange(n)
    return Prompts(torch.cat([body, body[rows, asked, None]], 1), body[rows, asked + 1], asked + 1)


def replaced(prompts: Prompts, low: int, high: int, seed: int = 0) -> Prompts:
    """The same prompts with another answer where the answer stands, drawn from tokens low to high - 1.

    The new one is a token that the prompt has not, so nothing else changes: a corrupted run for patching.
    """
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(len(prompts), high - low, generator=generator)
    present = (prompts.tokens.unsqueeze(-1) == torch.arange(low, high)).any(1)
    if present.all(-1).any():
        raise ValueError(f"a prompt has all tokens from {low} to {high - 1}: none is left to put in")
    new = scores.masked_fill(present, -1).argmax(-1) + low
    tokens = prompts.tokens.clone()
    tokens[torch.arange(len(prompts)), prompts.where] = new
    return Prompts(tokens, new, prompts.where)
