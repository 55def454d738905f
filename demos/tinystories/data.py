"""Token streams, random crops of them, and held-out loss."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from demos.tinystories.cues import tell_cues
from demos.tinystories.grammar import tell_stories
from demos.tinystories.options import Options
from demos.tinystories.text import digest, read_stories
from demos.tinystories.tokenizer import (
    describe_text,
    encode_stream,
    load_tokenizer,
    save_tokenizer,
    train_tokenizer,
)


class Corpus(NamedTuple):
    """The texts of one run, tokenised."""

    tokenizer: PreTrainedTokenizerFast
    real: Tensor
    generated: Tensor | None
    held_out: list[Tensor]
    held_out_chars: int
    stories: dict[str, list[str]]
    digest: str


def load_corpus(options: Options) -> Corpus:
    """Read, tell and tokenise. Without `options.tokenizer` one is trained on the mix and kept in the run's folder.

    Raises
    ------
    ValueError
        If a text is shorter than one row.
    """
    stories = {"real": read_stories(options.text), "held out": read_stories(options.valid), "generated": []}
    if options.generated_share:
        stories["generated"] = list(tell_stories(options.generated_stories, options.seed))
        stories["generated"] += tell_cues(options.cue_stories, options.seed)
    folder = options.tokenizer or options.out / "tokenizer"
    if options.tokenizer is None and not (folder / "tokenizer.json").is_file():
        text = describe_text(len(stories["real"]), len(stories["generated"]))
        save_tokenizer(train_tokenizer(stories["real"] + stories["generated"], options.d_vocab), folder, text)
    tokenizer = load_tokenizer(folder)
    streams = {name: torch.tensor(encode_stream(tokenizer, texts)) for name, texts in stories.items() if texts}
    for name, stream in streams.items():
        if len(stream) <= options.length:
            raise ValueError(f"the {name} text has {len(stream)} tokens, expected more than length={options.length}")
    return Corpus(
        tokenizer=tokenizer,
        real=streams["real"],
        generated=streams.get("generated"),
        held_out=windows(streams["held out"], options.length),
        held_out_chars=sum(map(len, stories["held out"])),
        stories=stories,
        digest=digest([*stories["real"], *stories["generated"], *stories["held out"], *sorted(tokenizer.get_vocab())]),
    )


def crops(corpus: Corpus, options: Options, generator: torch.Generator) -> Int[Tensor, "b l"]:
    """A batch of rows b l, each a random crop of the real or (with probability generated_share) the told stream."""
    told = torch.rand(options.batch, generator=generator) < options.generated_share
    places = torch.rand(options.batch, generator=generator, dtype=torch.float64)
    rows = []
    for is_told, place in zip(told.tolist(), places.tolist(), strict=True):
        stream = corpus.generated if is_told and corpus.generated is not None else corpus.real
        start = int(place * (len(stream) - options.length + 1))
        rows.append(stream[start : start + options.length])
    return torch.stack(rows)


def windows(stream: Int[Tensor, " n"], length: int, batch: int = 16) -> list[Tensor]:
    """Batches of rows that predict each token of the stream but the first exactly once.

    Rows overlap by one token; the last row may be shorter and then is a batch of its own.
    """
    starts = range(0, len(stream) - 1, length - 1)
    rows = [stream[start : start + length] for start in starts]
    full = [row for row in rows if len(row) == length]
    batches = [torch.stack(full[i : i + batch]) for i in range(0, len(full), batch)]
    return batches + [row[None] for row in rows if len(row) < length]


class HeldOut(NamedTuple):
    """Held-out loss. Characters are those of the stories; the end-of-text tokens' loss is counted, too."""

    nats_per_token: float
    nats_per_char: float
    perplexity: float


@torch.no_grad()
def held_out_loss(model: Any, batches: list[Tensor], chars: int) -> HeldOut:
    """Mean loss over batches of rows b l, weighted by the tokens predicted."""
    nats, count = 0.0, 0
    for tokens in batches:
        predicted = tokens.shape[0] * (tokens.shape[1] - 1)
        nats += float(model(tokens, return_type="loss")) * predicted
        count += predicted
    return HeldOut(nats / count, nats / chars, math.exp(nats / count))
