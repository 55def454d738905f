"""Synthetic tasks whose answers are at known positions, to check that tools point at the right place.

Every draw is determined by its seed. Tokens are plain integers; no tokenizer is needed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
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
        """A selection of rows."""
        return Prompts(self.tokens[chosen], self.answers[chosen], self.where[chosen])


@dataclass(frozen=True)
class Drill:
    """Sequences with many questions each, to train on; up to the first question each is a prompt."""

    tokens: Int[Tensor, "b l"]
    """Behind every question stands its answer."""
    asked: Int[Tensor, " q"]
    """The positions of the questions, the same in all rows."""

    @property
    def answers(self) -> Int[Tensor, "b q"]:
        """What should come next at the questions."""
        return self.tokens[:, self.asked + 1]


def associative_recall(n: int, pairs: int = 4, keys: int = 8, values: int = 8, seed: int = 0) -> Prompts:
    """Key value key value ... key: which value followed that key? (Arora et al. 2023, arXiv:2312.04927.)

    Parameters
    ----------
    n
        Prompts.
    pairs
        Different keys of a prompt; it is 2 pairs + 1 tokens long.
    keys, values
        Key tokens are 0 to keys - 1, value tokens keys to keys + values - 1; the values of a prompt differ.
    """
    generator = torch.Generator().manual_seed(seed)
    body = _pairs(n, pairs, keys, values, generator)
    asked = 2 * torch.randint(pairs, (n,), generator=generator)
    rows = torch.arange(n)
    return Prompts(torch.cat([body, body[rows, asked, None]], 1), body[rows, asked + 1], asked + 1)


def recall_drill(n: int, pairs: int = 4, keys: int = 8, values: int = 8, questions: int = 8, seed: int = 0) -> Drill:
    """Pairs as in :func:`associative_recall`, then questions with their answers. Values and questions may repeat.

    If every pair were asked for once, guessing "a value of the prompt that has not been an answer yet" would do well
    enough for training to get stuck there; if values never repeated, a model could learn to skip any that occurs twice.
    """
    generator = torch.Generator().manual_seed(seed)
    body = _pairs(n, pairs, keys, values, generator)
    body[:, 1::2] = keys + torch.randint(values, (n, pairs), generator=generator)
    asked = 2 * torch.randint(pairs, (n, questions), generator=generator)
    return _with_questions(body, asked)


def _pairs(n: int, pairs: int, keys: int, values: int, generator: torch.Generator) -> Int[Tensor, "n l"]:
    if not 1 <= pairs <= min(keys, values):
        raise ValueError(f"{pairs} pairs need as many different keys and values, there are {keys} and {values}")
    key = torch.rand(n, keys, generator=generator).argsort(-1)[:, :pairs]
    value = torch.rand(n, values, generator=generator).argsort(-1)[:, :pairs] + keys
    return torch.stack([key, value], -1).flatten(1)


def _with_questions(body: Int[Tensor, "n m"], asked: Int[Tensor, "n q"]) -> Drill:
    """Questions and their answers in turn: the tokens at `asked` and those that follow them."""
    turns = torch.stack([body.gather(1, asked), body.gather(1, asked + 1)], -1).flatten(1)
    return Drill(torch.cat([body, turns], 1), body.shape[1] + 2 * torch.arange(asked.shape[1]))


def induction(n: int, length: int = 16, vocab: int = 24, seed: int = 0) -> Prompts:
    """Different tokens in random order, then one of them again: what followed it?

    Parameters
    ----------
    length
        Of a prompt, the question included.
    vocab
        Tokens 0 to vocab - 1, at least length - 1 of them.
    """
    generator = torch.Generator().manual_seed(seed)
    body = _different(n, length, vocab, generator)[:, : length - 1]
    asked = torch.randint(length - 2, (n,), generator=generator)
    rows = torch.arange(n)
    return Prompts(torch.cat([body, body[rows, asked, None]], 1), body[rows, asked + 1], asked + 1)


def induction_drill(n: int, length: int = 16, vocab: int = 24, questions: int = 8, seed: int = 0) -> Drill:
    """Prompts as in :func:`induction`, then questions with their answers. Questions may repeat, other tokens too.

    What a row asks for occurs once, at even places only or at odd ones only, and is never an answer: so each question
    has one answer, although the next question follows it.
    """
    generator = torch.Generator().manual_seed(seed)
    order = _different(n, length, vocab, generator)
    first = torch.randint(2 if length > 3 else 1, (n, 1), generator=generator)
    place = torch.arange(length - 1)
    other = torch.randint(length // 2, vocab, (n, length - 1), generator=generator)
    body = order.gather(1, torch.where((place - first) % 2 == 0, place // 2, other))
    choices = (length - 1 - first) // 2  # places first, first + 2, ... that have a follower
    asked = first + 2 * (torch.rand(n, questions, generator=generator) * choices).long()
    return _with_questions(body, asked)


def _different(n: int, length: int, vocab: int, generator: torch.Generator) -> Int[Tensor, "n v"]:
    """All tokens in random order, if there are enough of them."""
    if length < 3 or vocab < length - 1:
        raise ValueError(f"need length of 3 or more and vocab of length - 1 or more, got {length} and {vocab}")
    return torch.rand(n, vocab, generator=generator).argsort(-1)


def replaced(prompts: Prompts, low: int, high: int, seed: int = 0) -> Prompts:
    """The same prompts with another answer where the answer stands, drawn from tokens low to high - 1.

    The new answer is a token that the prompt does not contain, so nothing else changes: a corrupted run for patching.
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


def renamed(prompts: Prompts, vocab: int, classes: int = 1, seed: int = 0) -> Prompts:
    """Prompts of the same layout in which every token is replaced by one that the prompt does not contain.

    The answer stays at its position. Nothing else agrees, so a patch anywhere changes something.

    Parameters
    ----------
    vocab
        Tokens 0 to vocab - 1.
    classes
        Equal parts of the vocabulary that tokens stay in (2 for keys and values).
    """
    size = vocab // classes
    if size * classes != vocab:
        raise ValueError(f"{vocab} tokens do not divide into {classes} classes")
    n = len(prompts)
    generator = torch.Generator().manual_seed(seed)
    present = torch.zeros(n, vocab, dtype=torch.bool).scatter(1, prompts.tokens, True).reshape(n, classes, size)
    used = present.sum(-1, keepdim=True)
    if (2 * used > size).any():
        raise ValueError(f"a prompt has {int(used.max())} of {size} tokens of a class: too few are left to rename them")
    # The prompt's tokens first, in random order, then the others: each is renamed to the one `used` places behind.
    order = (torch.rand(n, classes, size, generator=generator) + ~present).argsort(-1)
    behind = order.gather(-1, (torch.arange(size) + used) % size)
    names = torch.empty_like(order).scatter(-1, order, behind) + size * torch.arange(classes)[:, None]
    names = names.flatten(1)
    new = names.gather(1, prompts.tokens), names.gather(1, prompts.answers[:, None])[:, 0]
    return Prompts(*new, prompts.where)


def shuffled(prompts: Prompts, keep: Bool[Tensor, "b l"], seed: int = 0) -> Prompts:
    """The same tokens in another order: none stays in place except those to keep, and the question.

    The answer's token is still there, but elsewhere, so that only its position distinguishes it from the others.

    Parameters
    ----------
    keep
        Positions whose tokens stay, such as the keys; the answer must not be among them.
    """
    n, length = prompts.tokens.shape
    rows = torch.arange(n)
    stays = keep.clone()
    stays[:, -1] = True
    if stays[rows, prompts.where].any():
        raise ValueError("keep holds the position of an answer, which is to get another token")
    count = (~stays).sum(-1, keepdim=True)
    if (count < 2).any():
        raise ValueError("a prompt has fewer than two tokens to exchange")
    # The positions that move first, in random order; each gets the token of the next, the last that of the first.
    generator = torch.Generator().manual_seed(seed)
    order = (torch.rand(n, length, generator=generator) + stays).argsort(-1)
    place = torch.arange(length).expand(n, -1)
    behind = torch.where(place < count, (place + 1) % count, place)
    tokens = torch.empty_like(prompts.tokens).scatter(1, order, prompts.tokens.gather(1, order.gather(1, behind)))
    return Prompts(tokens, tokens[rows, prompts.where], prompts.where)
