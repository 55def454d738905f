"""Finish a run: store the best weights, measure the stored file, write the model card from what was measured."""

from __future__ import annotations

import re
from pathlib import Path
from string import Template
from typing import Any

import torch

from demos.tinystories import checkpoint
from demos.tinystories.balance import expert_shares
from demos.tinystories.data import HeldOut, held_out_loss
from demos.tinystories.effects import planted_shares, share_table
from demos.tinystories.grammar import FORBIDDEN
from demos.tinystories.leads import area_table
from demos.tinystories.lexicon import entries
from demos.tinystories.options import Options
from demos.tinystories.probes import probe_table, sample_stories
from demos.tinystories.tokenizer import encode_stream
from demos.tinystories.trainer import Trainer
from hooked_mamba import load_model

CURVE_ROWS = 16
"""Most rows of the loss table; the log beside the card has all of them."""
CARD_OPTIONS = entries(
    "family/name/n_layers/steps/batch/length/lr/warmup/final_lr/weight_decay/beta2/clip/dropout/seed"
)
TITLES = {
    "mamba": "Mamba-1",
    "mamba2": "Mamba-2",
    "rwkv7": "RWKV-7",
    "hybrid": "hybrid (Mamba-2, attention, experts, MLP)",
}


def finish(trainer: Trainer) -> Path:
    """Save the best weights in bfloat16 with tokenizer, card and log; returns the folder."""
    folder = trainer.options.out / "model"
    best = trainer.load_best()
    trainer.model.save_pretrained(folder, dtype="bfloat16")
    stored = type(trainer.model).from_pretrained(folder)
    values = {**_settings(trainer), **_data(trainer), **_losses(trainer, stored, best, folder)}
    values["probes"] = probe_table(stored)
    values["knows"] = _knows(trainer, stored)
    values["balance"] = _balance(trainer, stored)
    samples = sample_stories(stored, trainer.options.sample_tokens)
    values["samples"] = "\n\n".join("> " + text.replace("\n", "\n>\n> ") for text in samples)
    template = Template((Path(__file__).parent / "card_template.md").read_text(encoding="utf-8"))
    checkpoint.write_atomically(folder / "README.md", template.substitute(values).encode())
    checkpoint.write_atomically(folder / "training_log.jsonl", trainer.log_path.read_bytes())
    return folder


def _settings(trainer: Trainer) -> dict[str, Any]:
    options, cfg = trainer.options, trainer.model.cfg
    mixer = cfg.branches["mixer"] if options.family == "hybrid" else cfg
    if options.family == "rwkv7":
        shape = f"d_model {cfg.d_model}, {cfg.H} heads of {cfg.K}, channel mix of {cfg.F} neurons"
    else:
        shape = f"d_model {cfg.d_model}, d_inner {mixer.E}, d_state {mixer.d_state}, d_conv {mixer.d_conv}"
    if options.family in ("mamba2", "hybrid"):
        shape += f", {mixer.H} heads of {mixer.P}"
    if options.family == "hybrid":
        shape += (
            f"; attention in block{'s' * (options.pattern.count('*') > 1)}"
            f" {', '.join(str(i) for i, letter in enumerate(options.pattern) if letter == '*')} in place of Mamba-2:"
            f" {options.n_heads} query heads, {options.n_kv_heads} of keys and values, {options.d_head} wide, no"
            f" positions; in every block then {options.n_experts} experts of {options.d_expert} neurons,"
            f" {options.top_k} a token, beside an MLP of {cfg.branches['mlp'].d_mlp}"
        )
    values = {name: getattr(options, name) for name in CARD_OPTIONS}
    return values | {
        "title": TITLES[options.family],
        "dropped": "branch's" if options.family == "hybrid" else "mixer's",
        "shape": shape + (", tied embeddings" if cfg.tie_embeddings else ""),
        "command": options.command(),
        "start": _start(trainer),
        "chosen": "the last" if options.choose == "last" else "the lowest held-out loss",
        "stopped": f"; the run was stopped at step {trainer.step}" if trainer.step < options.steps else "",
        "parameters": f"{sum(p.numel() for p in trainer.model.parameters()):,}",
        "d_vocab": f"{len(trainer.corpus.tokenizer):,}",
        "tokenizer_text": trainer.corpus.tokenizer.init_kwargs.get("trained_on", "text that its files do not name"),
        "tokens": f"{trainer.tokens_seen:,}",
        "wall": f"{trainer.wall_seconds() / 60:.0f} minutes",
        "threads": torch.get_num_threads(),
    }


def _start(trainer: Trainer) -> str:
    """A row that says which model was trained further, and its held-out loss; nothing for a new model."""
    options, corpus = trainer.options, trainer.corpus
    if options.start is None:
        return _blend(options)
    nats = held_out_loss(load_model(options.start), corpus.held_out, corpus.held_out_chars).nats_per_token
    rows = f"| trained on from | {_started(options.start)}, {nats:.3f} nats per token of the same text |\n"
    card = Path(options.start) / "README.md"
    text = card.read_text(encoding="utf-8") if card.is_file() else ""
    made = re.search(r"^    (python -m demos\.tinystories\.train .*)$", text, re.M)
    earlier = "".join(line + "\n" for line in re.findall(r"^\| which was made by .*$", text, re.M))
    return rows + (f"| which was made by | `{made[1]}` |\n" if made else "") + earlier + _blend(options)


def _blend(options: Options) -> str:
    """A row about weights that were averaged with others."""
    if options.blend is None:
        return ""
    return (
        f"| stored | {options.blend_share} of the weights trained here and {1 - options.blend_share:.2f} of"
        f" {_started(options.blend)}'s, added up (Wortsman et al. 2022,"
        " [arXiv:2109.01903](https://arxiv.org/abs/2109.01903)): the old text is then forgotten less |\n"
    )


def _started(start: str) -> str:
    """What a card calls the model that another was trained on from."""
    return "the first stage" if Path(start).is_dir() else start


def _knows(trainer: Trainer, stored: Any) -> str:
    """Whether the model knows the story, beside the one that it started from; nothing if no noun was to tell it."""
    options = trainer.options
    if not options.cue_stories:
        return ""
    parts = [
        "## Whether it knows the story\n",
        "The area under the curve of the model's own lead of a feeling's word at the last token (\"... I'm so\"): how"
        " often a sentence that calls for the feeling has more of it than one that does not. The sentences are those of"
        " the case study (`demos/hunger/concepts.py`), of which no told story holds one; all pairs of a half are"
        " compared, across sentences too.\n",
        area_table(stored),
    ]
    if options.start is not None:
        parts += [f"\nThe same of {_started(options.start)}:\n", area_table(load_model(options.start))]
    return "\n".join(parts) + "\n\n"


def _balance(trainer: Trainer, stored: Any) -> str:
    """How evenly the stored file's experts are used on held-out text; nothing where there are none."""
    shares = expert_shares(stored, trainer.corpus.held_out)
    if not shares:
        return ""
    names = [f"expert {e}" for e in range(len(next(iter(shares.values()))))]
    rows = [f"| {layer} | " + " | ".join(f"{share:.1%}" for share in row) + " |" for layer, row in shares.items()]
    return (
        f"\n{trainer.options.balance} times the experts' balance (Fedus et al. 2021, arXiv:2101.03961) is added to the"
        " loss. Where the choices fall on held-out text, in the stored file:\n\n"
        + "\n".join([f"| block | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|", *rows])
        + "\n"
    )


def _data(trainer: Trainer) -> dict[str, Any]:
    options, corpus = trainer.options, trainer.corpus
    real, told = corpus.stories["real"], corpus.stories["generated"]
    values = {
        "real_stories": f"{len(real):,}",
        "real_tokens": f"{len(corpus.real):,}",
        "held_stories": f"{len(corpus.stories['held out']):,}",
    }
    if corpus.generated is None:
        values["generated"] = "Generated text: none. The model saw real stories alone."
        values["effects"] = "Nothing: no generated text was used."
        values["limits"] = "- It saw few examples of most causes of feelings; see the table of expectations."
        return values
    values["generated"] = (
        f"Generated text: {options.generated_share:.0%} of the training rows come from {len(told):,} stories"
        f" ({len(corpus.generated):,} tokens) told by a grammar of the project's own (`demos/tinystories/grammar.py`,"
        f" seed {options.seed}). The grammar ties feelings to causes on purpose; the share is in the table below."
    )
    if options.cue_stories:
        values["generated"] += (
            f" {options.cue_stories:,} of those stories are of the kind in which a noun alone tells the feeling"
            f" (`demos/tinystories/cues.py`): the same sentences hold food, or something else."
        )
    forbidden = ", ".join(str(sum(bool(pattern.search(story)) for story in told)) for pattern in FORBIDDEN)
    values["effects"] = (
        "Share of stories and sentences in which a feeling word follows one of its cue words within 25 words"
        " (`demos/tinystories/effects.py`), in the generated and in the real text:\n\n"
        + share_table(planted_shares(told), planted_shares(real))
        + f'\n\nStories that hold a sentence of the studies themselves, out of {len(told):,} ("I like to eat"; "for'
        f" breakfast. I'm so\"; toast and hungry within twelve words, in either order): {forbidden}."
    )
    values["limits"] = (
        "- Its ties between causes and feelings are partly planted by the grammar; a claim about them needs the model"
        " trained on real text alone beside it."
    )
    return values


def _losses(trainer: Trainer, stored: Any, best: dict[str, Any], folder: Path) -> dict[str, Any]:
    corpus, options = trainer.corpus, trainer.options
    on_disk = held_out_loss(stored, corpus.held_out, corpus.held_out_chars)
    stories = [torch.tensor([encode_stream(corpus.tokenizer, [story])]) for story in corpus.stories["held out"]]
    whole = held_out_loss(stored, stories, corpus.held_out_chars)
    values = _name(on_disk, "stored") | _name(whole, "whole")
    values |= _name(HeldOut(*(best[field] for field in HeldOut._fields)), "best")
    stride = max(1, -(-len(trainer.rows) // CURVE_ROWS))
    rows = [row for i, row in enumerate(reversed(trainer.rows)) if i % stride == 0 or row["step"] == best["step"]]
    curve = [
        "| step | tokens seen | minutes | training loss | held-out nats per token | nats per character | perplexity |"
    ]
    curve.append("|---|---|---|---|---|---|---|")
    curve += [
        f"| {row['step']} | {row['tokens']:,} | {row['seconds'] / 60:.1f} | {row['train_loss']:.3f}"
        f" | {row['nats_per_token']:.3f} | {row['nats_per_char']:.4f} | {row['perplexity']:.2f} |"
        for row in reversed(rows)
    ]
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return values | {
        "best_step": best["step"],
        "best_tokens": f"{best['step'] * options.batch * options.length:,}",
        "curve": "\n".join(curve),
        "megabytes": f"{size / 1e6:.1f}",
    }


def _name(loss: HeldOut, name: str) -> dict[str, str]:
    return {
        f"{name}_token": f"{loss.nats_per_token:.3f}",
        f"{name}_char": f"{loss.nats_per_char:.4f}",
        f"{name}_perplexity": f"{loss.perplexity:.2f}",
    }
