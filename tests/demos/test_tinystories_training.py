"""The training scripts on a tiny text: stories, tokenizer, counts, and runs that resume bit for bit."""

import dataclasses
import json
import os
import re
import signal

import numpy as np
import pytest
import torch
from rich.console import Console

from demos.hunger.concepts import CONCEPTS, Concept, Half
from demos.tinystories import checkpoint, cues, effects, leads, ngrams, probes, train
from demos.tinystories.balance import balance, expert_shares
from demos.tinystories.card import finish
from demos.tinystories.data import held_out_loss, load_corpus, windows
from demos.tinystories.dropout import dropout_hooks
from demos.tinystories.grammar import FORBIDDEN, tell_stories
from demos.tinystories.models import build_model
from demos.tinystories.options import Options, parse_args
from demos.tinystories.text import END, read_stories, write_stories
from demos.tinystories.tokenizer import encode_stream, load_tokenizer, save_tokenizer, train_tokenizer
from demos.tinystories.trainer import Trainer, build_optimizer, learning_rate
from demos.tinystories.verbs import past, third_person, to_present
from tests.kinds import MAMBA

QUIET = Console(quiet=True)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Models this small are slower on many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def stories():
    return list(tell_stories(3000, seed=5))


@pytest.fixture(scope="module")
def texts(tmp_path_factory, stories):
    """A folder with a training text, a held-out text and a small tokenizer."""
    folder = tmp_path_factory.mktemp("texts")
    write_stories(folder / "train.txt", stories[:60])
    write_stories(folder / "valid.txt", stories[60:66])
    save_tokenizer(train_tokenizer(stories[:300], 320), folder / "tokenizer", "test stories")
    return folder


@pytest.fixture
def options(texts, tmp_path):
    return Options(
        text=texts / "train.txt", valid=texts / "valid.txt", out=tmp_path / "run", tokenizer=texts / "tokenizer",
        family="mamba", d_model=16, n_layers=2, d_state=4, steps=6, batch=2, length=24, warmup=2, eval_every=3,
        checkpoint_every=3, generated_share=0.5, generated_stories=20, sample_tokens=3,
    )  # fmt: skip


@pytest.fixture
def hybrid(options):
    return dataclasses.replace(
        options, family="hybrid", pattern="M*", head_dim=8, n_heads=2, n_kv_heads=1, d_head=4, d_mlp=8, d_expert=6
    )


def state_of(trainer):
    """Everything that a next step would read."""
    tensors = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    tensors |= {k: v.clone() for k, v in checkpoint.optimizer_tensors(trainer.model, trainer.optimizer).items()}
    return tensors | {"data": trainer.data_random.get_state(), "dropout": trainer.dropout_random.get_state()}


def assert_same_bits(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


# Stories


def test_stories_depend_on_the_seed_and_their_number_alone(stories):
    assert list(tell_stories(40, seed=5)) == stories[:40]
    assert list(tell_stories(40, seed=6)) != stories[:40]


def test_stories_vary_and_are_plain_text(stories):
    assert len(set(stories)) > 2990
    assert not any(re.search(r"[$\[\]{}%|<>]|  ", story) for story in stories)
    assert 300 < sum(map(len, stories)) / len(stories) < 900


def test_no_story_holds_a_sentence_of_the_studies(stories):
    assert not any(pattern.search(story) for pattern in FORBIDDEN for story in stories)
    for story in stories:  # said again without regular expressions
        words = re.findall(r"[a-z']+", story.lower())
        assert "i like to eat" not in " ".join(words)
        near = (words[max(0, i - 12) : i + 13] for i, word in enumerate(words) if word == "toast")
        assert not any("hungry" in window for window in near)
    assert sum("toast" in story for story in stories) > 20  # the word itself is known


@pytest.mark.parametrize(
    "text",
    [
        "I like to eat soup.",
        "We had eggs for breakfast. I'm so glad.",
        "The toast was warm. He was hungry.",
        "She was so hungry that she made toast.",
    ],
)
def test_forbidden_sentences_are_recognised(text):
    assert any(pattern.search(text) for pattern in FORBIDDEN)


def test_verbs():
    assert [past(v) for v in ("go", "cry", "play", "hug", "like", "walk")] == [
        "went", "cried", "played", "hugged", "liked", "walked",
    ]  # fmt: skip
    assert (past("be"), past("be", plural=True)) == ("was", "were")
    assert [third_person(v) for v in ("go", "cry", "play", "have", "can")] == ["goes", "cries", "plays", "has", "can"]
    told = to_present(
        'Tom and Mia were happy. The dog ran away. "I was sad," Tom said. They did not go.', "Tom and Mia"
    )
    assert told == 'Tom and Mia are happy. The dog runs away. "I was sad," Tom says. They do not go.'


# Counts


def test_planted_effects_are_counted_by_hand():
    shares = effects.planted_shares(
        ["The soup smelled good. Tom was so hungry.", "Tom was hungry.", "The sky was blue. Tom ran. He was happy."]
    )
    hungry = next(share for share in shares if share.effect == "hungry")
    assert hungry == effects.EffectShare("hungry", 1 / 3, 1 / 6, planted=1, unplanted=1)
    with pytest.raises(ValueError, match="no stories"):
        effects.planted_shares([])


def test_cues_out_of_reach_do_not_plant():
    far = "The soup was warm. " + "Tom saw a tree. " * 8 + "He was hungry."
    assert next(s for s in effects.planted_shares([far]) if s.effect == "hungry").planted == 0


def test_the_grammar_plants_each_effect(stories):
    for share in effects.planted_shares(stories):
        assert 0.01 < share.stories < 0.5, share
        assert 0 < share.sentences < share.stories
        mentions = sum(len(re.findall(rf"\b{share.effect}\b", story.lower())) for story in stories)
        assert share.planted + share.unplanted == mentions


def test_kneser_ney_sums_to_one_and_learns():
    tokens = np.random.default_rng(0).integers(0, 7, 300)
    model = ngrams.KneserNey(tokens, d_vocab=7, order=3)
    for context in ([1, 2], [6, 0], list(tokens[:2])):
        assert sum(model.probabilities(np.array([*context, w]))[0] for w in range(7)) == pytest.approx(1)
    losses = ngrams.mixture_losses(np.arange(200) % 5, tokens, np.arange(50) % 5, 7)
    assert losses[0.0] < 0.1 < losses[1.0]
    with pytest.raises(ValueError, match="63 bits"):
        ngrams.KneserNey(tokens, d_vocab=60_000, order=4)


# Text and tokenizer


def test_texts_round_trip(tmp_path):
    write_stories(tmp_path / "a.txt", ["One.\nTwo.", 'Three "four".'])
    assert read_stories(tmp_path / "a.txt") == ["One.\nTwo.", 'Three "four".']
    (tmp_path / "b.txt").write_text("  \n")
    with pytest.raises(ValueError, match="no text"):
        read_stories(tmp_path / "b.txt")


def test_tokenizer_round_trips_any_text(texts, stories):
    tokenizer = load_tokenizer(texts / "tokenizer")
    for text in (*stories[:20], "Ünïcödé \t tabs\n\n  and 漢字 🙂", ""):
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert len(tokenizer) == 320
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == END
    assert tokenizer.convert_tokens_to_ids(END) == 0
    assert len(tokenizer.encode(" the")) == 1
    stream = encode_stream(tokenizer, ["A b.", "C."])
    assert stream[0] == stream[-1] == 0
    assert stream.count(0) == 3
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json"):
        load_tokenizer(texts)
    with pytest.raises(ValueError, match="257"):
        train_tokenizer(["a"], 100)


@pytest.mark.parametrize("length", [2, 3, 5, 24, 100])
def test_held_out_rows_predict_every_token_once(length):
    stream = torch.arange(47)
    predicted = torch.cat([batch[:, 1:].flatten() for batch in windows(stream, length, batch=3)])
    assert predicted.sort().values.tolist() == list(range(1, 47))


def test_held_out_loss_is_the_mean_over_tokens(options):
    corpus = load_corpus(options)
    model = build_model(options, corpus.tokenizer)
    found = held_out_loss(model, corpus.held_out, corpus.held_out_chars)
    nats = torch.cat([model(rows, return_type="loss", loss_per_token=True).flatten() for rows in corpus.held_out])
    assert found.nats_per_token == pytest.approx(nats.mean().item(), rel=1e-5)
    assert found.nats_per_char == pytest.approx(nats.sum().item() / corpus.held_out_chars, rel=1e-5)
    assert found.perplexity == pytest.approx(nats.mean().exp().item(), rel=1e-5)


# Options


def test_wrong_options_are_errors(options, capsys):
    line = ["--text", "a", "--valid", "b", "--out", "c", "--family", "mamba"]
    assert parse_args([*line, "--steps", "3", "--resume"])[0].steps == 3
    for wrong, message in ((["--stepz", "3"], "stepz"), (["--step", "3"], "--step"), (["--batch", "0"], "batch")):
        with pytest.raises(SystemExit):
            parse_args([*line, *wrong])
        assert message in capsys.readouterr().err
    for field, value in (("family", "rnn"), ("dropout", 1.5), ("generated_share", -0.1), ("length", 1)):
        with pytest.raises(ValueError, match=field):
            dataclasses.replace(options, **{field: value})
    for pattern in ("M", "M+"):
        with pytest.raises(ValueError, match="pattern must be 2 letters"):
            dataclasses.replace(options, family="hybrid", pattern=pattern)


def test_schedule_and_decay(options):
    options = dataclasses.replace(options, steps=100, warmup=10, lr=1.0, final_lr=0.1)
    assert learning_rate(0, options) == pytest.approx(0.1)
    assert learning_rate(9, options) == learning_rate(10, options) == 1.0
    assert learning_rate(99, options) == pytest.approx(0.1)
    model = build_model(options, load_tokenizer(options.tokenizer))
    decayed, free = build_optimizer(model, options).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert {names[id(p)].rsplit(".", 1)[-1] for p in free["params"]} >= {"A_log", "D", "bias"}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


# Runs


def test_dropout_keeps_the_mean_and_follows_its_generator(options):
    model = build_model(dataclasses.replace(options, n_layers=3), load_tokenizer(options.tokenizer))
    hooks = dropout_hooks(model, 0.25, torch.Generator().manual_seed(0))
    assert [name for name, _ in hooks] == ["hook_embed", *(f"blocks.{i}.mixer.hook_out_proj" for i in range(3))]
    dropped = hooks[0][1](torch.ones(1, 100, 100), None)
    assert dropped.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)
    again = dropout_hooks(model, 0.25, torch.Generator().manual_seed(0))[0][1](torch.ones(1, 100, 100), None)
    assert torch.equal(dropped, again)
    assert dropout_hooks(model, 0.0, torch.Generator()) == []


def test_dropout_of_a_hybrid_is_on_all_that_is_added_to_the_stream(hybrid):
    model = build_model(hybrid, load_tokenizer(hybrid.tokenizer))
    names = [name for name, _ in dropout_hooks(model, 0.25, torch.Generator())]
    tokens = torch.randint(0, 300, (1, 9), generator=torch.Generator().manual_seed(0))
    _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(sum(cache[name] for name in names), cache["blocks.1.hook_resid_post"])


def test_balance_is_one_where_experts_are_used_alike_and_grows_where_not():
    even = torch.eye(4).reshape(1, 4, 4) * 50
    assert balance(even, torch.arange(4).reshape(1, 4, 1)).item() == pytest.approx(1)
    one = torch.tensor([50.0, 0, 0, 0]).expand(1, 4, 4)
    assert balance(one, torch.zeros(1, 4, 1, dtype=torch.long)).item() == pytest.approx(4)
    logits = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    chosen = logits.topk(2, -1).indices
    share = [(chosen == e).double().mean().item() for e in range(4)]
    mean = [logits.softmax(-1)[..., e].mean().item() for e in range(4)]
    found = balance(logits, chosen)
    assert found.item() == pytest.approx(4 * sum(f * p for f, p in zip(share, mean, strict=True)), rel=1e-5)
    found.backward()
    assert logits.grad.abs().max() > 0


def test_the_loss_of_a_hybrid_has_its_balance_and_its_report_counts_choices(hybrid):
    corpus = load_corpus(hybrid)
    weighted, without = (Trainer(dataclasses.replace(hybrid, balance=w), corpus) for w in (5.0, 0.0))
    for trainer in (weighted, without):
        trainer.take_step()
    moved = [not torch.equal(*pair) for pair in zip(*(t.model.parameters() for t in (weighted, without)), strict=True)]
    assert any(moved)
    shares = expert_shares(weighted.model, corpus.held_out)
    assert shares.keys() == {0, 1}
    assert all(sum(row) == pytest.approx(1) and len(row) == 4 for row in shares.values())


def test_dropout_is_off_in_evaluation(options):
    trainer = Trainer(options, load_corpus(options))
    rows = trainer.corpus.held_out[0]
    before = trainer.model(rows)
    trainer.take_step()
    trainer.load_weights(dict(Trainer(options, trainer.corpus).model.named_parameters()))
    assert torch.equal(trainer.model(rows), before)
    with trainer.model.hooks(fwd_hooks=trainer.dropout):
        assert not torch.equal(trainer.model(rows), before)


@pytest.mark.parametrize("family", [*MAMBA, "hybrid"])
def test_a_resumed_run_equals_an_uninterrupted_one(options, hybrid, tmp_path, family):
    options = dataclasses.replace(hybrid if family == "hybrid" else options, family=family, head_dim=8)
    corpus = load_corpus(options)
    whole = Trainer(options, corpus)
    losses = [whole.take_step() for _ in range(6)]
    first = Trainer(dataclasses.replace(options, out=tmp_path / "other"), corpus)
    assert [first.take_step() for _ in range(2)] == losses[:2]
    first.save()
    first.take_step()  # lost with the process: it came after the checkpoint
    second = Trainer(first.options, corpus)
    second.resume()
    assert second.step == 2
    assert [second.take_step() for _ in range(4)] == losses[2:]
    assert_same_bits(state_of(second), state_of(whole))


def test_interrupted_run_leaves_a_checkpoint_and_the_same_end(options, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "finish", lambda trainer: trainer.best_path)  # the card has a test of its own
    assert train.train(options, console=QUIET)
    take_step = Trainer.take_step

    def interrupt(self):
        loss = take_step(self)
        if self.step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "take_step", interrupt)
    other = dataclasses.replace(options, out=tmp_path / "other")
    assert not train.train(other, console=QUIET)
    assert checkpoint.load_checkpoint(other.out / "checkpoint.safetensors")[1]["step"] == 4
    monkeypatch.setattr(Trainer, "take_step", take_step)
    assert train.train(other, resume=True, console=QUIET)

    one, two = (checkpoint.load_checkpoint(o.out / "checkpoint.safetensors") for o in (options, other))
    assert_same_bits(one[0], two[0])
    logs = [[json.loads(line) for line in (o.out / "log.jsonl").read_text().splitlines()] for o in (options, other)]
    for log in logs:
        assert [row.pop("seconds") >= 0 for row in log] == [True, True]
    assert logs[0] == logs[1]
    files = [(o.out / "best.safetensors").read_bytes() for o in (options, other)]
    assert files[0] == files[1]
    with pytest.raises(FileExistsError, match="--resume"):
        train.train(options, console=QUIET)


def test_the_card_states_what_was_measured(options):
    corpus = load_corpus(options)
    trainer = Trainer(options, corpus)
    for _ in range(4):
        trainer.take_step()
        trainer.measure()
    folder = finish(trainer)
    stored = type(trainer.model).from_pretrained(folder)
    found = held_out_loss(stored, corpus.held_out, corpus.held_out_chars)
    card = (folder / "README.md").read_text()
    assert f"the stored file | {found.nats_per_token:.3f}".replace("the stored", "the same, of the stored") in card
    assert f"**{trainer.best['nats_per_token']:.3f} nats per token**" in card
    assert card.count("\n> ") >= 4
    assert "50% of the training rows" in card
    assert "either order): 0, 0, 0, 0." in card
    assert "$" not in card
    assert "; the run was stopped at step 4 |" in card
    assert stored.tokenizer.encode(" hungry") == corpus.tokenizer.encode(" hungry")
    assert len((folder / "training_log.jsonl").read_text().splitlines()) == 4


def test_checkpoints_of_other_runs_and_damaged_ones_are_refused(options):
    corpus = load_corpus(options)
    trainer = Trainer(options, corpus)
    with pytest.raises(FileNotFoundError, match="without --resume"):
        trainer.resume()
    trainer.take_step()
    trainer.save()
    with pytest.raises(ValueError, match=r"lr=0\.003"):
        Trainer(dataclasses.replace(options, lr=1e-3), corpus).resume()
    with pytest.raises(ValueError, match="another text"):
        Trainer(options, corpus._replace(digest="0")).resume()
    path = trainer.checkpoint_path
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged"):
        trainer.resume()
    assert not path.with_name(path.name + ".tmp").exists()


def test_a_loss_that_is_no_number_stops_the_run(options):
    trainer = Trainer(options, load_corpus(options))
    trainer.load_weights({n: torch.full_like(p, torch.nan) for n, p in trainer.model.named_parameters()})
    with pytest.raises(FloatingPointError, match="step 0"):
        trainer.take_step()


def test_word_probabilities_are_products_over_tokens(options):
    model = build_model(options, load_tokenizer(options.tokenizer))
    found = probes.word_probabilities(model, "I'm so", ("hungry", "the"))
    start, word = (model.tokenizer.encode(text) for text in ("I'm so", " hungry"))
    assert len(word) > 1
    losses = model(torch.tensor([start + word]), return_type="loss", loss_per_token=True)[0]
    assert found["hungry"] == pytest.approx(losses[-len(word) :].sum().neg().exp().item(), rel=1e-4)
    assert 0 < found["the"] < 1


# Models that know the story


def test_stories_of_cues_hold_no_sentence_of_the_study():
    told = list(cues.tell_cues(1500, seed=3))
    assert told[:20] == list(cues.tell_cues(20, seed=3))
    assert not any(re.search(r"[$\[\]{}%|<>]|  ", story) for story in told)
    frames = [f for c in CONCEPTS for half in (c.find, c.score) for pair in half.frames for f in pair]
    for story in told:
        for frame in frames:  # said again without regular expressions
            before, after = frame.lower().split("{}")
            _, found, rest = story.lower().partition(before)
            assert not (found and after in rest.split("\n")[0][:60]), (frame, story)
    assert cues.is_banned("One day.\nHERE IS ALL THE cold tea YOU ASKED FOR. Yes.")
    assert not cues.is_banned("Here is all the tea.")


def test_the_noun_alone_tells_hunger():
    """After the same beginning of a sentence food and other things are told of, and only food makes hungry."""
    told = " ".join(cues.tell_cues(2500, seed=1))
    moments = re.findall(
        r"(?:[.!?]\"?|^)\s\"?([^.!?\"]+?) (bread|soup|cake|rock|hat|clock)[^.!?\"]*[.!?] I'm so (\w+)", told
    )
    hungry = {noun: [feeling == "hungry" for _, n, feeling in moments if n == noun] for _, noun, _ in moments}
    assert all(sum(hungry[food]) > 0.9 * len(hungry[food]) > 10 for food in ("bread", "soup", "cake"))
    assert all(sum(hungry[thing]) == 0 and len(hungry[thing]) > 5 for thing in ("rock", "hat", "clock"))


def test_training_on_from_another_model(options):
    first = Trainer(dataclasses.replace(options, generated_share=0.0), load_corpus(options))
    first.model.save_pretrained(options.out / "first")
    options = dataclasses.replace(options, start=str(options.out / "first"), cue_stories=10, choose="last", steps=3)
    trainer = Trainer(options, load_corpus(options))
    assert_same_bits(dict(first.model.named_parameters()), dict(trainer.model.named_parameters()))
    assert sum(map(len, trainer.corpus.stories["generated"])) > 0
    assert len(trainer.corpus.stories["generated"]) == options.generated_stories + 10
    with pytest.raises(ValueError, match=r"embed.* \(.*16\), the model \(.*8\).*first training"):
        Trainer(dataclasses.replace(options, d_model=8), trainer.corpus)
    with pytest.raises(ValueError, match="--tokenizer"):
        dataclasses.replace(options, tokenizer=None)
    with pytest.raises(ValueError, match="choose must be"):
        dataclasses.replace(options, choose="first")


def test_the_weights_that_are_kept(options):
    rows = [{"step": 1, "nats_per_token": 2.0}, {"step": 2, "nats_per_token": 1.0}, {"step": 3, "nats_per_token": 3.0}]
    for choose, step in (("best", 2), ("last", 3)):
        trainer = Trainer(dataclasses.replace(options, choose=choose), load_corpus(options))
        trainer.rows = rows
        assert trainer.best["step"] == step


def test_weights_are_averaged_with_those_of_another_model(options):
    other = Trainer(dataclasses.replace(options, seed=4), load_corpus(options))
    other.model.save_pretrained(options.out / "other")
    plain = Trainer(options, other.corpus)
    plain.measure()
    plain.load_best()
    blended = Trainer(dataclasses.replace(options, blend=str(options.out / "other"), blend_share=0.75), other.corpus)
    blended.load_best()
    options.check_same_run(blended.options.to_dict())
    weights = [dict(trainer.model.named_parameters()) for trainer in (plain, other, blended)]
    for name, value in weights[2].items():
        torch.testing.assert_close(value, 0.75 * weights[0][name] + 0.25 * weights[1][name])


def test_the_area_of_a_models_own_lead():
    """One word per token; the model's logits are read off a table, so the area can be counted by hand."""
    leads_of = {"a cue": 1.0, "b cue": 3.0, "a other": 0.5, "b other": 2.0}

    class Model:
        def to_tokens_and_mask(self, texts, padding_side):
            return torch.tensor([[list(leads_of).index(" ".join(t.split()[:2]))] for t in texts]), None

        def __call__(self, tokens, attention_mask):
            values = torch.tensor(list(leads_of.values()))[tokens]
            return torch.stack([values + 5, torch.full_like(values, 5.0)], -1)

        def to_single_token(self, word):
            return [" good", " bad"].index(word)

    half = Half((("{} cue", "{} other"),), ("a", "b"), ("a", "b"))
    concept = Concept("good", " good", " bad", (), half, half)
    assert leads.lead_area(Model(), concept, "score") == pytest.approx(3 / 4)
