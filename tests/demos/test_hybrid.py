"""The demo of what attention adds: its knockouts and sums by other ways, its models, its page, its training."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM

from demos.hybrid import measure
from demos.hybrid.__main__ import main
from demos.hybrid.knockouts import knockouts
from demos.hybrid.model import build
from demos.hybrid.options import Options
from demos.hybrid.stories import KINDS, LENGTH, MODEL, kinds_of, losses, stories, wanted
from demos.hybrid.study import memory
from demos.hybrid.train import HybridTrainer, finish
from demos.localisation.options import parse_args
from demos.localisation.task import Task
from demos.tinystories import checkpoint
from hooked_mamba import HookedHybrid, load_model
from hooked_mamba.loading.files import PRETRAINED
from tests.demos.test_tour import Tags

TASK = Task("recall", 4, 20)


@pytest.fixture
def options(tmp_path):
    return Options(
        out=tmp_path / "run", size=4, vocab=20, d_model=8, d_state=4, head_dim=4, n_heads=2, d_head=3, d_mlp=5,
        d_expert=6, steps=4, grow=2, batch=4, questions=3, warmup=2, held_out=8, eval_every=2, checkpoint_every=2,
    )  # fmt: skip


@pytest.fixture
def model(options):
    made = build(options).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for name, weight in made.named_parameters():  # at its first values a model of this size hardly says anything
        if weight.ndim >= 2 and not name.endswith("A_log"):
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[-1] ** 0.5)
    return made


def block_without(model: HookedHybrid, what: str, layer: int) -> HookedHybrid:
    """The same knockout by changed weights."""
    other = copy.deepcopy(model)
    branches = other.block(layer).branches
    if what == "the state":
        branches["mixer"].A_log.fill_(50.0)
    elif what.startswith("head"):
        h, c = int(what.split()[1]), branches["attn"].cfg.d_head
        branches["attn"].o_proj.weight[:, h * c : (h + 1) * c] = 0
    elif what.startswith("expert"):
        branches["moe"].down_proj[int(what.split()[1].rstrip(","))] = 0
    elif what == "all experts":
        branches["moe"].down_proj.zero_()
    elif what == "the MLP":
        branches["mlp"].down_proj.weight.zero_()
    elif what == "attention":
        branches["attn"].o_proj.weight.zero_()
    else:
        assert what == "Mamba-2"
        branches["mixer"].out_proj.weight.zero_()
    return other


def test_knockouts_are_what_changed_weights_do(model):
    tokens, seen = TASK.prompts(6, 0).tokens, set()
    clean = model(tokens)
    for one in knockouts(model):
        with model.hooks(fwd_hooks=one.hooks):
            got = model(tokens)
        seen.add(one.what)
        assert (got - clean).abs().max() > 1e-4, one.title
        if "forbidden" in one.what:
            continue
        torch.testing.assert_close(got, block_without(model, one.what, one.block)(tokens), rtol=0, atol=1e-12)
    assert {"the state", "Mamba-2", "attention", "all experts", "the MLP", "head 1", "expert 3, silenced"} <= seen


def test_a_forbidden_expert_is_never_chosen_and_others_stay_where_it_was_not(model):
    tokens = TASK.prompts(6, 0).tokens
    name = "blocks.0.moe.hook_expert_indices"
    before = model.run_with_cache(tokens, names_filter=name)[1][name]
    for e in range(4):
        one = next(k for k in knockouts(model) if k.title == f"block 0: expert {e}, forbidden")
        with model.hooks(fwd_hooks=one.hooks):
            after = model.run_with_cache(tokens, names_filter=name)[1][name]
        assert not (after == e).any()
        had = (before == e).any(-1)
        assert had.any()
        assert torch.equal(after[~had], before[~had])
        kept = before[had][before[had] != e]
        assert all(k in row for k, row in zip(kept.tolist(), after[had].tolist(), strict=True))


def test_the_parts_of_the_lead_sum_to_it(model):
    prompts = TASK.prompts(6, 0)
    parts = measure.taken_apart(model, prompts)
    logits = model(prompts.tokens)[:, -1]
    for b in range(6):
        values = prompts.tokens[b, 1:-1:2].tolist()
        others = [float(logits[b, v]) for v in values if v != prompts.answers[b]]
        expected = float(logits[b, prompts.answers[b]]) - sum(others) / len(others)
        assert float(measure.lead(model, prompts)[b]) == pytest.approx(expected, abs=1e-12)
        assert sum(float(part[b]) for part in parts.values()) == pytest.approx(expected, abs=1e-11)
    assert {"embed", "0_mixer_out", "0: expert 3", "0_mlp_out", "1: head 1", "1: expert 0"} <= parts.keys()
    assert all(part.shape == (6,) for part in parts.values())


def test_memory_is_the_size_of_what_a_pass_hands_on(model):
    fixed, grows = memory(model, TASK.length)
    _, state = model(TASK.prompts(1, 0).tokens, return_state=True)
    _, other = model(TASK.prompts(1, 0).tokens[:, :-2], return_state=True)

    def numbers(one):
        kv = one[1]["attn"]
        return one[0]["mixer"].ssm.numel(), kv.k.numel() + kv.v.numel()

    assert (fixed, grows) == numbers(state)
    assert numbers(other) == (fixed, grows * (TASK.length - 2) // TASK.length)


def test_kinds_of_tokens_by_hand():
    tokens = torch.tensor([[7, 1, 2, 1, 2, 3, 2, 7, 1, 5, 5, 5]])
    found = []
    for t in range(1, 12):
        row = tokens[0].tolist()
        pairs = list(itertools.pairwise(row[:t]))
        copied = (row[t - 1], row[t]) in pairs
        found.append("copied" if copied else "seen" if row[t] in row[:t] else "new")
    masks = kinds_of(tokens)
    assert list(masks) == list(KINDS)
    assert [next(kind for kind in KINDS if masks[kind][0, t]) for t in range(11)] == found
    assert torch.stack(list(masks.values())).sum(0).eq(1).all()
    assert set(found) == set(KINDS)


def test_ages_are_equal_parts_of_the_pairs(model):
    rates = measure.by_age(model, TASK, 40)
    prompts = TASK.prompts(40, measure.SEED)
    right = model(prompts.tokens)[:, -1].argmax(-1) == prompts.answers
    for age, rate in enumerate(rates):
        here = [bool(r) for r, w in zip(right, prompts.where.tolist(), strict=True) if w // 2 == age]
        assert (rate.hits, rate.n) == (sum(here), len(here))


# The models that come with it ------------------------------------------------------------------------------------


def test_attention_recalls_what_a_state_of_this_size_does_not():
    rates = {}
    for name in measure.NAMES:
        model, task = measure.load(name)
        rates[name] = measure.score(model, task.prompts(100, 3)).right.value
    assert rates["hybrid"] >= 0.97
    assert rates["wide"] >= 0.97
    assert rates["state"] <= 0.7


def test_the_hybrid_needs_its_convolution_and_attention_and_the_others_their_state():
    def right(name):
        model, task = measure.load(name)
        found = measure.knocked_out(model, {32: task.prompts(60, 3)}, lambda one: one.kind in ("mixer", "attn"))
        return {one.title: scores[32].right.value for one, scores in found}

    hybrid, wide = right("hybrid"), right("wide")
    assert hybrid["block 1: attention"] < 0.3
    assert hybrid["block 0: Mamba-2"] < 0.3
    assert hybrid["block 0: the state"] > 0.9
    assert wide["block 0: the state"] < 0.3


@pytest.mark.slow
@torch.no_grad()
def test_transformers_reads_the_bundled_hybrid_as_we_do():
    model = load_model(MODEL)
    assert sorted({name for i in range(4) for name in model.block(i).branches}) == ["attn", "mixer", "mlp", "moe"]
    theirs = AutoModelForCausalLM.from_pretrained(PRETRAINED / MODEL, dtype=torch.float32).eval()
    tokens = model.to_tokens("Once upon a time, there was a little girl. She")
    logits = model(tokens)
    assert (logits - theirs(tokens).logits).abs().max() < 1e-4 * logits.abs().max()
    got = model.generate(tokens, 20, do_sample=False, verbose=False)
    assert torch.equal(got, theirs.generate(tokens, max_new_tokens=20, do_sample=False, pad_token_id=0))


@pytest.mark.slow
def test_attention_in_the_story_model_is_for_what_the_story_has_said():
    model = load_model(MODEL)
    tokens = stories(model, 12)
    assert tokens.shape == (12, LENGTH)
    groups, intact = kinds_of(tokens), losses(model, tokens)
    attention = next(one for one in wanted(model) if one.what == "attention")
    more = losses(model, tokens, attention.hooks) - intact
    copied, seen, new = (float(more[groups[kind]].mean()) for kind in KINDS)
    assert copied > seen > new
    assert copied > 2 * new


@pytest.mark.slow
def test_the_page_loads_nothing_and_has_every_table(tmp_path, capsys):
    main(["--prompts", "32", "--stories", "2", "--out", str(tmp_path)])
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    found = Tags()
    found.feed(page)
    assert found.addresses == ["data:,"]
    assert found.tags.count("section") == found.tags.count("table") == 8
    assert "make hybrid" in page
    assert "block 1: expert 3" in capsys.readouterr().out


def test_wrong_calls_are_one_clear_error(options, capsys):
    with pytest.raises(SystemExit):
        main(["--prompts", "2"])
    assert "32 or more" in capsys.readouterr().err
    with pytest.raises(ValueError, match="pattern must be 2 letters"):
        dataclasses.replace(options, pattern="M+")
    parsed, resume = parse_args(["--out", "x", "--pattern", "MM", "--resume"], Options, "about")
    assert (parsed.pattern, resume) == ("MM", True)


# Training --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_uninterrupted_one(options, tmp_path):
    whole = HybridTrainer(options)
    losses = [whole.take_step() for _ in range(4)]
    first = HybridTrainer(dataclasses.replace(options, out=tmp_path / "other"))
    assert [first.take_step() for _ in range(2)] == losses[:2]
    first.save()
    second = HybridTrainer(first.options)
    second.resume()
    assert [second.take_step() for _ in range(2)] == losses[2:]
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert whole.extra_loss().item() > 0
    whole.measure()
    card = (finish(whole) / "README.md").read_text()
    assert "attention (block 1)" in card
    assert "$" not in card
    tensors, _ = checkpoint.load_checkpoint(first.checkpoint_path)
    assert any(name.startswith("model.blocks.1.attn") for name in tensors)
