"""The page's sections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from demos.hybrid.measure import (
    NAMES,
    SEED,
    SIZES,
    Score,
    at,
    by_age,
    by_size,
    knocked_out,
    lead,
    load,
    looked_at,
    score,
    taken_apart,
    task_of,
)
from demos.hybrid.stories import MODEL, stories_section
from demos.localisation.stats import Rate
from demos.localisation.task import Task
from demos.studies.report import Report, Section, Table, layer_map
from hooked_mamba import HookedHybrid
from hooked_mamba.analysis.tasks import Prompts

AGES = ("oldest quarter", "second", "third", "latest quarter")
KNOCKED = (4, 32)
"""Pairs of the prompts that knockouts are judged on."""
ORDER = {"embed": "the question's own embedding", "mixer": "Mamba-2", "moe": "experts", "mlp": "MLP"}


def study(prompts: int = 400, n_stories: int = 32) -> Report:
    """The whole study, on so many prompts of each size and stories."""
    models = {name: load(name) for name in NAMES}
    hybrid, task = models["hybrid"]
    report = Report(
        "hybrid",
        "What attention adds to a state",
        f"Prompts of up to {task.size} keys, each followed by its value, and then one of the keys again: which value"
        " followed it? Two models of two blocks and the same size differ in the second block alone, attention in"
        " one and Mamba-2 in the other; a third has four times the state. Then the hybrid is decomposed: what each"
        " head, the state and each expert is needed for, and what each contributes to the answer.",
        "Recall after Arora et al. 2023 (arXiv:2312.04927); all models were trained here"
        " (python -m demos.hybrid.train).",
        "; ".join(f"{name}: {parameters(model):,} parameters" for name, (model, _) in models.items()) + ".",
    )
    report.sections += [
        sizes_section(models, prompts),
        ages_section(models, prompts),
        knockout_section(hybrid, task, prompts),
        state_section(models, prompts),
        attention_section(hybrid, task, prompts),
        parts_section(hybrid, task, prompts),
        experts_section(hybrid, task, prompts),
    ]
    if n_stories:
        report.sections.append(stories_section(HookedHybrid.from_pretrained(MODEL).requires_grad_(False), n_stories))
    return report


def parameters(model: HookedHybrid) -> int:
    """How many numbers were trained."""
    return sum(p.numel() for p in model.parameters())


def memory(model: HookedHybrid, tokens: int) -> tuple[int, int]:
    """Numbers that are kept of a prompt: in states of fixed size, and in keys and values."""
    fixed = grows = 0
    for i in range(model.cfg.n_layers):
        branches = model.block(i).branches
        if "mixer" in branches:
            fixed += branches["mixer"].cfg.d_inner * branches["mixer"].cfg.d_state
        if "attn" in branches:
            cfg = branches["attn"].cfg
            grows += 2 * cfg.n_key_value_heads * cfg.d_head * tokens
    return fixed, grows


def shape(model: HookedHybrid) -> list[str]:
    """The branches that read the past, and the state size."""
    words, sizes = [], set()
    for i in range(model.cfg.n_layers):
        branches = model.block(i).branches
        words.append("Mamba-2" if "mixer" in branches else "attention")
        sizes |= {str(branches["mixer"].cfg.d_state)} if "mixer" in branches else set()
    return [", ".join(words), ", ".join(sorted(sizes))]


def sizes_section(models: dict[str, Any], n: int) -> Section:
    """Accuracy by the number of keys."""
    rows, shares = [], []
    for name, (model, task) in models.items():
        found = by_size(model, task, n)
        fixed, grows = memory(model, task.length)
        kept = f"{fixed:,} + {grows:,}" if grows else f"{fixed:,}"
        rows.append([name, *shape(model), kept, *(percent(one.right) for one in found)])
        shares.append([one.right.value for one in found])
    columns = ["model", "blocks", "N", "numbers kept", *(f"{pairs} keys" for pairs in SIZES)]
    keys = [str(pairs) for pairs in SIZES]
    return Section(
        "How many keys each can hold",
        f"Share of right answers, {n} new prompts of each size. Numbers kept: what is left of a prompt of"
        f" {models['hybrid'][1].size} pairs for the question to read, in states of fixed size and, behind the plus, in"
        " attention's keys and values, which grow with the prompt.",
        Table(columns, rows, texts=2),
        [
            layer_map(
                torch.tensor(shares), keys, "share of right answers, by keys", "{:.1%}", list(models), diverging=False
            )
        ],
        f"Guessing one of the values in the prompt is right in 1 of {SIZES[-1]} cases at {SIZES[-1]} keys. A state"
        " of N numbers per channel can tell N keys apart without mixing them; attention keeps every key for itself.",
    )


def ages_section(models: dict[str, Any], n: int) -> Section:
    """Accuracy by how long ago the answer was read."""
    rows = [[name, *(str(rate) for rate in by_age(model, task, n))] for name, (model, task) in models.items()]
    return Section(
        "What is lost: by age",
        f"The same prompts of {models['hybrid'][1].size} keys, by where the asked key stood; in brackets Wilson's 95%"
        " interval.",
        Table(["model", *AGES], rows),
    )


def knockout_section(model: HookedHybrid, task: Task, n: int) -> Section:
    """Everything but single experts taken out of the hybrid, one thing at a time."""
    prompts = prompts_of(task, n)
    intact = {pairs: score(model, these) for pairs, these in prompts.items()}
    found = knocked_out(model, prompts, lambda one: not one.what.startswith("expert"))
    rows = [["nothing", *cells(intact, intact)], *([one.title, *cells(these, intact)] for one, these in found)]
    return Section(
        "What the hybrid needs",
        f"One thing is taken out in every position, {n} prompts of each size. Nats lost: how much the mean"
        " log P(answer) falls. The state: A_bar is 0, so that every position forgets what came before; the convolution"
        " still joins a key with its value.",
        Table(knocked_columns(), rows),
    )


def experts_section(model: HookedHybrid, task: Task, n: int) -> Section:
    """Every expert taken out in two ways, and what it works on."""
    prompts = {task.size: task.prompts(n, SEED)}
    intact = {pairs: score(model, these) for pairs, these in prompts.items()}
    found = knocked_out(model, prompts, lambda one: one.what.startswith("expert"))
    texts = {(one.block, one.what): cells(these, intact) for one, these in found}
    shares = choices(model, prompts[task.size].tokens)
    rows = []
    for i in range(model.cfg.n_layers):
        for e in range(model.block(i).branches["moe"].cfg.n_experts):
            both = texts[i, f"expert {e}, silenced"] + texts[i, f"expert {e}, forbidden"]
            rows.append([f"block {i}: expert {e}", *(percent_of(share) for share in shares[i][e]), *both])
    columns = ["", "keys", "values", "question", "silenced: right", "nats lost", "forbidden: right", "nats lost"]
    return Section(
        "What each expert is for",
        f"{n} prompts of {task.size} keys. First where the choices of each kind of position fall: keys, values and the"
        " question. Silenced: the expert's weight is 0 where it was chosen. Forbidden: the router chooses another.",
        Table(columns, rows),
        after="Recall is a look-up, which convolution and attention do between them.",
    )


@torch.no_grad()
def choices(model: HookedHybrid, tokens: Tensor) -> list[Tensor]:
    """For each block, where the choices fall: expert by kind of position (keys, values, the question)."""
    _, cache = model.run_with_cache(tokens, names_filter="blocks.*.moe.hook_expert_indices")
    place = torch.arange(tokens.shape[1])
    kinds = [(place % 2 == 0) & (place < place[-1]), place % 2 == 1, place == place[-1]]
    found = []
    for i in range(model.cfg.n_layers):
        chosen, n_experts = cache[f"blocks.{i}.moe.hook_expert_indices"], model.block(i).branches["moe"].cfg.n_experts
        taken = [torch.bincount(chosen[:, kind].flatten(), minlength=n_experts) for kind in kinds]
        found.append(torch.stack([count / count.sum() for count in taken], 1))
    return found


def prompts_of(task: Task, n: int) -> dict[int, Prompts]:
    """Prompts that knockouts are judged on, by their pairs."""
    return {pairs: task_of(task, pairs).prompts(n, SEED) for pairs in KNOCKED}


def knocked_columns() -> list[str]:
    """Two a size."""
    return ["taken out", *(text for pairs in KNOCKED for text in (f"right, {pairs} keys", "nats lost"))]


def state_section(models: dict[str, Any], n: int) -> Section:
    """The state taken out of each model, block by block."""
    rows = []
    for name, (model, task) in models.items():
        prompts = prompts_of(task, n)
        intact = {pairs: score(model, these) for pairs, these in prompts.items()}
        found = knocked_out(model, prompts, lambda one: one.kind == "mixer")
        rows += [[f"{name}, {one.title}", *cells(these, intact)] for one, these in found]
    return Section(
        "Where the others keep the keys",
        "The same two interventions on the mixers of all three models. With attention behind it, the mixer of block 0"
        " is needed and its state is not: the convolution is enough to join a key with its value. Without attention,"
        " the keys are gone when that state forgets.",
        Table(knocked_columns(), rows),
    )


def cells(found: dict[int, Score], intact: dict[int, Score]) -> list[str]:
    """Two columns a size."""
    texts = []
    for pairs, one in found.items():
        texts += [percent(one.right), f"{intact[pairs].nats - one.nats:z.3f}"]
    return texts


def attention_section(model: HookedHybrid, task: Task, n: int) -> Section:
    """Where each head looks from the question."""
    prompts = task.prompts(n, SEED)
    layer = next(i for i in range(model.cfg.n_layers) if "attn" in model.block(i).branches)
    rows = looked_at(model, prompts, layer)
    n_heads, last = rows.shape[1], rows.shape[-1] - 1
    places = {
        "the value": at(rows, prompts.where),
        "its key": at(rows, prompts.where - 1),
        "the token behind": at(rows, (prompts.where + 1).clamp(max=last)),
        "the question": rows[..., -1],
    }
    top = torch.stack([(rows[:, h].argmax(-1) == prompts.where).float().mean() for h in range(n_heads)])
    table = [
        [f"head {h}", *(percent_of(value[:, h].mean()) for value in places.values()), percent_of(top[h])]
        for h in range(n_heads)
    ]
    words = task.words(prompts.tokens[0].tolist())
    answer = int(prompts.where[0])
    words = [f"{word} ←" if t == answer else word for t, word in enumerate(words)]
    names = [f"head {h}" for h in range(n_heads)]
    plot = layer_map(rows[0], words, "share of the question's look", "{:.1%}", names, diverging=False)
    return Section(
        "Where the heads look",
        f"The question's row of the pattern in block {layer}, a mean over the same {n} prompts of {task.size} keys, and"
        " how often its largest entry stands on the value.",
        Table(["", *places, "largest on the value"], table),
        [plot],
        "One prompt; the arrow marks the value that is asked for. Block 0 has joined each value with its key, so that"
        " the question finds the value's position by the key.",
    )


def parts_section(model: HookedHybrid, task: Task, n: int) -> Section:
    """The lead of the answer as a sum over branches, heads and experts."""
    prompts = task.prompts(n, SEED)
    parts = taken_apart(model, prompts)
    total, measured = sum(value.mean() for value in parts.values()), lead(model, prompts).double().mean()
    rows = [[named(label), f"{float(value.mean()):+.3f}", share(value)] for label, value in parts.items()]
    rows += [["sum", f"{float(total):+.3f}", ""], ["measured at the logits", f"{float(measured):+.3f}", ""]]
    return Section(
        "What each part contributes to the answer",
        "The lead: the answer's logit less the mean logit of the prompt's other values. With the last norm's divisor"
        " held as it was, the lead is a sum over everything that wrote into the stream at the question."
        f" Means over {n} prompts of {task.size} keys. Last column: how often a part is for the answer.",
        Table(["wrote into the stream", "lead, logits", "for the answer"], rows),
    )


def named(label: str) -> str:
    """A component in words."""
    if label == "embed":
        return ORDER["embed"]
    if ":" in label:
        layer, what = label.split(": ")
        return f"block {layer}: {what}"
    layer, branch, _ = label.split("_")
    return f"block {layer}: {ORDER.get(branch, branch)}"


def share(value: Tensor) -> str:
    """How often a part raises the answer; nothing where it never says anything."""
    return percent_of((value > 0).double().mean()) if bool((value != 0).any()) else ""


def percent(rate: Rate) -> str:
    """A rate without its interval."""
    return f"{rate.value:.1%}"


def percent_of(value: Tensor) -> str:
    """A share."""
    return f"{float(value):.1%}"
