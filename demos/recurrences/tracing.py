"""Where an answer comes from: three readings of one sum, and what is said where there is no answer.

The lead of the answer's logit over the mean of all possible answers, with selection, gates and norms held, is a sum
of parts. Each reading names the position of the largest one:

1. Token: of the embeddings. Where a convolution has put a key and its value into one number p, p times SiLU's factor is
   divided between the two by their shares of p, although the factor itself knows both.
2. Token, beyond the average prompt: the same of what each embedding has beyond the mean of all prompts at its position,
   so that what any key would add there counts for none.
3. Write: of the values that enter some layer's memory, of all layers and positions; what a convolution spreads counts
   where it enters. A value of layer 1 holds what layer 0 has put at its position.

The first two name a position of the prompt by what stood there, the third by where a memory was written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuits import Attribution, FrozenModel, Logit, attribute
from demos.localisation.stats import Rate
from demos.recurrences.subjects import KEYS, PAIRS, VALUES, Subject, recall
from hooked_mamba import HookedModel
from hooked_mamba.analysis.tasks import Prompts

VALUE_TOKENS = list(range(KEYS, KEYS + VALUES))


@dataclass(frozen=True)
class Named:
    """How often the largest part is that of a certain position."""

    answer: Rate
    """The answer's own."""
    before: Rate
    """The one before it, which holds the key, or the token that was asked for."""
    question: Rate
    """The last."""


@dataclass(frozen=True)
class Traced:
    """One model, by each reading."""

    token: Named
    beyond: Named
    """Token, beyond the average prompt."""
    write: Named


class BeyondTheMean(FrozenModel):
    """At the bottom, covectors meet what embeddings have beyond the mean of all prompts at their position."""

    @property
    def embeddings(self) -> Float[Tensor, "b l d"]:
        return super().embeddings - super().embeddings.mean(0)


def traced(
    model: HookedModel, prompts: Prompts, values: list[int], n: int, answered_by: HookedModel | None = None
) -> Traced:
    """All readings of the first n prompts that are answered right (by the model itself unless another is given).

    Parameters
    ----------
    values
        Tokens that could be answers.
    """
    right = (answered_by or model)(prompts.tokens)[:, -1].argmax(-1) == prompts.answers
    prompts = prompts.rows(right.nonzero()[:n, 0])
    target = Logit(tuple(prompts.answers.tolist()), minus=values)
    found = attribute(FrozenModel(model, prompts.tokens), targets=target)
    beyond = attribute(BeyondTheMean(model, prompts.tokens), targets=target, keep_heads=False, unexplained="keep")
    largest = (found.embeddings.argmax(-1), beyond.embeddings.argmax(-1), largest_write(model, found))
    return Traced(*(_named(position, prompts) for position in largest))


def largest_write(model: HookedModel, found: Attribution) -> Int[Tensor, " n"]:
    """The position of the largest part among the values that enter the memory of any layer."""
    layers = range(model.cfg.n_layers)
    return torch.stack([found.token_heads[layer].sum(-1) for layer in layers]).amax(0).argmax(-1)


def _named(position: Int[Tensor, " n"], prompts: Prompts) -> Named:
    places = (prompts.where, prompts.where - 1, torch.full_like(position, prompts.tokens.shape[1] - 1))
    return Named(*(Rate(int((position == place).sum()), len(prompts)) for place in places))


def traced_recall(subject: Subject, n: int, seed: int) -> tuple[Traced, Traced]:
    """By the trained model, and by the same before training on the same prompts."""
    prompts = recall(2 * n, PAIRS, seed)
    trained = traced(subject.model, prompts, VALUE_TOKENS, n)
    return trained, traced(subject.untrained, prompts, VALUE_TOKENS, n, subject.model)


def traced_induction(subject: Subject, n: int, seed: int) -> Traced:
    """By the model of induction."""
    task = subject.induction_task
    return traced(subject.induction, task.prompts(2 * n, seed), list(range(task.vocab)), n)


@dataclass(frozen=True)
class Default:
    """What is said in recall where the answer's embedding is that of no value: the mean of them all."""

    token: int
    """What is said most."""
    said: Rate
    """How often."""
    answer: Rate
    """How often the traced token is the answer's in prompts whose answer is another token."""
    kept: Rate
    """The same where the answer is this token: a model that says it by default need not read it."""


def default(subject: Subject, n: int, seed: int) -> Default:
    """In n prompts that are answered right."""
    model, prompts = subject.model, recall(2 * n, PAIRS, seed)
    prompts = prompts.rows((model(prompts.tokens)[:, -1].argmax(-1) == prompts.answers).nonzero()[:n, 0])
    rows, mean = torch.arange(len(prompts)), model.embed.weight[VALUE_TOKENS].mean(0)
    hooks = [("hook_embed", lambda embed, hook: embed.index_put((rows, prompts.where), mean.to(embed.dtype)))]
    said = model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)[:, -1].argmax(-1)
    token = int(said.bincount().argmax())
    target = Logit(tuple(prompts.answers.tolist()), minus=VALUE_TOKENS)
    found = attribute(FrozenModel(model, prompts.tokens), targets=target, keep_heads=False)
    hit, by_default = found.embeddings.argmax(-1) == prompts.where, prompts.answers == token
    shares = (Rate(int(hit[chosen].sum()), int(chosen.sum())) for chosen in (~by_default, by_default))
    return Default(token, Rate(int((said == token).sum()), len(prompts)), *shares)
