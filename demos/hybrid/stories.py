"""The same knockouts in the bundled hybrid that writes stories: which tokens does each part predict?

Tokens are told apart by what the story so far gives away:

    copied     this token stood behind the same token before: to be copied from there
    seen       it stood somewhere before
    new        it did not
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from demos.hybrid.knockouts import Hooks, Knockout, knockouts
from demos.studies.report import Section, Table
from demos.tinystories.grammar import tell_stories

MODEL = "tinystories-hybrid-4l"
KINDS = ("copied", "seen", "new")
LENGTH = 128


def stories(model: Any, n: int, seed: int = 1000) -> Int[Tensor, "b l"]:
    """Beginnings of told stories that are long enough, the token that begins a story in front."""
    rows = []
    for text in tell_stories(100 * n, seed):
        ids = [model.tokenizer.bos_token_id, *model.tokenizer.encode(text, add_special_tokens=False)]
        if len(ids) >= LENGTH:
            rows.append(ids[:LENGTH])
        if len(rows) == n:
            break
    return torch.tensor(rows)


def kinds_of(tokens: Int[Tensor, "b l"]) -> dict[str, Bool[Tensor, "b t"]]:
    """Which of the predicted tokens, 1 to l - 1, are of each kind."""
    now, to_come = tokens[:, :-1], tokens[:, 1:]
    earlier = torch.ones(now.shape[1], now.shape[1], dtype=torch.bool).tril(-1)
    same = to_come[:, :, None] == to_come[:, None]
    behind_same = same & (now[:, :, None] == now[:, None])
    copied = (behind_same & earlier).any(-1)
    seen = (
        (to_come[:, :, None] == now[:, None]).logical_and(earlier | torch.eye(len(earlier), dtype=torch.bool)).any(-1)
    )
    return {"copied": copied, "seen": seen & ~copied, "new": ~seen & ~copied}


@torch.no_grad()
def losses(model: Any, tokens: Int[Tensor, "b l"], hooks: Hooks | None = None) -> Float[Tensor, "b t"]:
    """Nats of every predicted token."""
    with model.hooks(fwd_hooks=hooks or []):
        return model(tokens, return_type="loss", loss_per_token=True)


def wanted(model: Any) -> Iterator[Knockout]:
    """All but the experts that are forbidden."""
    return (one for one in knockouts(model) if "forbidden" not in one.what)


def stories_section(model: Any, n: int) -> Section:
    """Loss by kind of token, with everything in place and with each thing taken out."""
    tokens = stories(model, n)
    groups = kinds_of(tokens)
    intact = losses(model, tokens)
    rows = [["nothing: the loss, nats", *(f"{float(intact[mask].mean()):.3f}" for mask in groups.values())]]
    rows.append(["tokens", *(f"{int(mask.sum()):,}" for mask in groups.values())])
    for one in wanted(model):
        more = losses(model, tokens, one.hooks) - intact
        rows.append([one.title, *(f"{float(more[mask].mean()):+z.3f}" for mask in groups.values())])
    return Section(
        "In a model that writes stories",
        f"The same in the bundled {MODEL}: {len(tokens)} told stories, the first {LENGTH} tokens of each. Copied: the"
        " token has followed the same token before in this story. Seen: it stood elsewhere in it. New: neither. Below:"
        " how much the loss rises when one thing is taken out, in nats per token.",
        Table(["taken out", *KINDS], rows),
    )
