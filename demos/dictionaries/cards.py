"""What the cards of bundled dictionaries say of their training, from the trainings' own checkpoints and logs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from demos.dictionaries.tune import coders_in
from demos.wording import listed

NOBODY = "0"
"""What is given with --told for a stage that no told stories were trained on."""

HEADING = "## Training of the write dictionaries"
"""Over what a card says of them."""

FIGURES = "The figures above are of held-out text"
"""How the sentence begins that ends what a card says of write dictionaries."""

REST = "All other rows are its own training mix (see its card)."
"""What a card says of the rows that no model told."""


def text_of(told: list[list[str]], rest: str = REST) -> str:
    """What the card says of the text.

    Parameters
    ----------
    told
        For every stage the share of its rows that was sampled from models, and the models.
    rest
        A sentence about all other rows.
    """
    if rest == REST and all(share == NOBODY for share, *_ in told):
        return "The text is the model's own training mix (see its card)."
    stages = [
        f"{float(share):.0%} of the rows are stories that {listed(tellers)} told at temperature 1"
        if tellers
        else "no row was told by a model"
        for share, *tellers in told
    ]
    if stages.count(stages[0]) == len(stages):
        sampled = f"{stages[0][0].upper()}{stages[0][1:]}"
    else:
        named = (f"of stage {i} {stage}" for i, stage in enumerate(stages, start=1))
        sampled = "; ".join(named).capitalize()
    return f"{sampled}: text that the model has not learnt by heart. {rest}"


def through_the_model(stage: dict[str, Any]) -> str:
    """What the card says of a stage of fine-tuning."""
    options = stage["state"]["finetune"]
    return (
        f"{stage['tokens']:,} positions in {stage['state']['step']:,} steps through the model, all layers replaced"
        f" at once, on KL(clean || spliced) + {options['reconstruction']} times the share of variance missed, learning"
        f" rate {options['lr']}"
    )


def tuned_section(
    stages: list[Path],
    told: list[list[str]],
    average: int = 1,
    earlier: str | None = None,
    note: str = "",
    rest: str = REST,
) -> str:
    """What the card says of a training in stages, from all stages' last checkpoints and logs.

    Parameters
    ----------
    stages
        Folders of the trainings, the last one at the end.
    told, rest
        See :func:`text_of`.
    average
        How many stages' ends the weights are the means of.
    earlier
        What the card said of the coders that the first stage went on from; None: it was a training at the sites.
    note
        What else there is to say of it.
    """
    found = [_last(folder) for folder in stages]
    parts = [through_the_model(stage) for stage in (found if earlier else found[1:])]
    if earlier:
        cfg = next(iter(coders_in(stages[-1]).values())).cfg
        begun = f"{earlier} From there, as {cfg.architecture} with k={cfg.k}: {parts.pop(0)}"
    else:
        train = found[0]["state"]["train"]
        begun = (
            "Write dictionaries are SAEs on the value that a token writes into a layer's memory (x of Mamba after its"
            f" convolution, v of attention). {found[0]['tokens']:,} positions (repeats counted) in"
            f" {found[0]['state']['step']:,} steps on what the layers write, learning rate"
            f" {_rate(train)}, decay to 0 over the last {train['decay']:.0%}"
        )
    then = "".join(f"; then {part}" for part in parts)
    mean = "" if average == 1 else f"; the weights are the means over the ends of the last {average} stages"
    return f"""
{HEADING}

{begun}{then}{mean}. {text_of(told, rest)} {note + " " if note else ""}{FIGURES}
and of the files as stored; `dead_share` is the share of latents that are silent in all of the held-out text.
Made by `demos/dictionaries`.
"""


def _last(run: Path) -> dict[str, Any]:
    """A run's last checkpoint and the positions that it had seen."""
    path = max((run / "checkpoints").glob("step-*")) / "state.json"
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return {"state": json.loads(path.read_text(encoding="utf-8")), "tokens": last["tokens"]}


def _rate(train: dict[str, Any]) -> str:
    """The learning rate of a training at the sites."""
    return str(train["lr"] or "6e-4 / sqrt(d_sae / 16384)")


def training_section(run: Path) -> str:
    """What the card says of the training, from the last checkpoint and the log."""
    last = _last(run)
    state, train = last["state"], last["state"]["train"]
    return f"""
## Training

Trained in one stage, at their sites: {last["tokens"]:,} positions (repeats counted) in {state["step"]:,} steps;
Adam, learning rate {_rate(train)}, warm-up over {train["warmup"]:.0%} of the steps, decay to 0 over the last
{train["decay"]:.0%}; seed {train["seed"]}. The text is the
model's own training mix (see its card). The figures above are of held-out text and of the files as stored;
`dead_share` is the share of latents that were silent for {train["dead_after_tokens"]:,} positions when training ended.
Made by `demos/dictionaries`.

A MambaCoder reads one position and its block mixes many: most of what it misses no function of that position has.
"""


def stored_as(section: str, dtype: str) -> str:
    """A section that says in which number format its figures' files are."""
    return re.sub(r"files as stored(, in \w+)?", f"files as stored, in {dtype}", section)


def kept_sections(to: Path) -> list[str]:
    """What the card there says of training, by coders' kinds, which a push leaves out."""
    card = to / "README.md"
    _, *sections = card.read_text(encoding="utf-8").split("\n## Training") if card.is_file() else [""]
    return [f"\n## Training{section}" for section in sections]


def others(sections: list[str], section: str) -> str:
    """Those under another heading than a section's; all of them if it is empty."""
    return "".join(one for one in sections if not section or _heading(one) != _heading(section))


def of_writes(sections: list[str]) -> str:
    """The section about write dictionaries; empty if there is none."""
    return next((one for one in sections if _heading(one) == HEADING), "")


def earlier_text(sections: list[str]) -> str:
    """What a card says of how write dictionaries were made, on one line, for those that go on from them."""
    return " ".join(of_writes(sections).partition(HEADING)[2].partition(FIGURES)[0].split())


def _heading(section: str) -> str:
    return section.strip().splitlines()[0]
