"""Generation: against a loop over whole forward passes, with sampling, stops, ragged batches and hooks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_mamba.model.generation import sample_logits
from tests.hooked_mamba.test_text import WORDS, word_tokenizer
from tests.hooked_mamba.tiny import build, relative, tokens_for
from tests.kinds import MIXERS, WITH_STATES

pytestmark = pytest.mark.usefixtures("fast")
GREEDY = {"do_sample": False, "verbose": False, "stop_at_eos": False}


@pytest.fixture(scope="module", params=MIXERS)
def model(request):
    return build(request.param, seed=5).double().requires_grad_(False)


def by_hand(model, tokens: Tensor, new: int, hooks=()) -> Tensor:
    """Greedy generation that reads everything anew at each step."""
    for _ in range(new):
        logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
        tokens = torch.cat([tokens, logits[:, -1].argmax(-1, keepdim=True)], 1)
    return tokens


def test_greedy_equals_a_loop_over_forward(model):
    tokens = tokens_for(model, rows=3, length=4)
    out = model.generate(tokens, max_new_tokens=8, **GREEDY)
    assert torch.equal(out, by_hand(model, tokens, 8))
    assert torch.equal(model.generate(tokens, max_new_tokens=0, **GREEDY), tokens)


def test_other_greedy_ways(model):
    tokens = tokens_for(model, rows=2, length=4)
    greedy = model.generate(tokens, max_new_tokens=6, **GREEDY)
    for options in ({"top_k": 1}, {"temperature": 0.0}, {"top_p": 1e-6}, {"temperature": 1e-4}):
        out = model.generate(tokens, max_new_tokens=6, verbose=False, stop_at_eos=False, **options)
        assert torch.equal(out, greedy), options


def test_sampling_is_reproducible(model):
    tokens = tokens_for(model, rows=2, length=4)

    def run(seed: int, **options) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens, max_new_tokens=12, verbose=False, generator=generator, **options)

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(run(1, top_k=3, top_p=0.8), run(1, top_k=3, top_p=0.8))
    torch.manual_seed(3)
    first = model.generate(tokens, max_new_tokens=12, verbose=False)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(tokens, max_new_tokens=12, verbose=False))


def test_frequencies_of_samples():
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])
    generator = torch.Generator().manual_seed(0)

    def frequencies(**options) -> Tensor:
        drawn = sample_logits(logits.expand(20000, -1), generator=generator, **options)
        return torch.bincount(drawn, minlength=5) / 20000

    probabilities = logits.softmax(-1)
    assert (frequencies() - probabilities).abs().max() < 0.02
    assert (frequencies(temperature=2.0) - (logits / 2).softmax(-1)).abs().max() < 0.02
    top2 = torch.where(torch.arange(5) < 2, probabilities, 0)
    assert (frequencies(top_k=2) - top2 / top2.sum()).abs().max() < 0.02
    # Cumulated: 0.64, 0.87, 0.96, ...; the token that passes the limit is still in.
    for limit, kept in ((0.5, 1), (0.7, 2), (0.9, 3), (1.0, 5)):
        nucleus = torch.where(torch.arange(5) < kept, probabilities, 0)
        assert (frequencies(top_p=limit) - nucleus / nucleus.sum()).abs().max() < 0.02
    assert frequencies(top_k=100).min() > 0


def test_frequency_penalty():
    logits = torch.tensor([[2.0, 1.5, 0.0]])
    seen = torch.tensor([[0, 0, 2]])
    assert sample_logits(logits, temperature=0.0, freq_penalty=0.2, tokens=seen).item() == 0
    assert sample_logits(logits, temperature=0.0, freq_penalty=0.3, tokens=seen).item() == 1


def test_stop_tokens(model):
    tokens = tokens_for(model, rows=2, length=4, seed=1)
    free = model.generate(tokens, max_new_tokens=10, **GREEDY)
    stop = int(free[0, 6])  # the third new token of the first row
    out = model.generate(tokens, max_new_tokens=10, eos_token_id=stop, do_sample=False, verbose=False)
    for row, free_row in zip(out, free, strict=True):
        new = free_row[4:].tolist()
        expected = new if stop not in new else new[: new.index(stop) + 1]
        got = row[4:].tolist()
        assert got == expected[: len(got)] + [stop] * (len(got) - len(expected))
    one = model.generate(tokens[:1], max_new_tokens=10, eos_token_id=[stop, 999 % 17], do_sample=False, verbose=False)
    assert one.shape[1] <= 7, "nothing is computed past the end of every row"


@pytest.mark.parametrize("side", ["left", "right"])
def test_ragged_prompts_equal_each_alone(model, side):
    lengths, width, new = (5, 1, 3), 5, 6
    rows = [tokens_for(model, 1, n, seed=n)[0] for n in lengths]
    batch, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for i, row in enumerate(rows):
        real = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        batch[i, real], mask[i, real] = row, 1
    for mask_type in (torch.long, torch.bool, torch.float32):
        out = model.generate(batch, max_new_tokens=new, attention_mask=mask.to(mask_type), **GREEDY)
        for i, row in enumerate(rows):
            alone = model.generate(row[None], max_new_tokens=new, **GREEDY)
            assert torch.equal(out[i, width:], alone[0, len(row) :])
    options = GREEDY | {"freq_penalty": 1.0}
    out = model.generate(batch, max_new_tokens=new, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = model.generate(row[None], max_new_tokens=new, **options)
        assert torch.equal(out[i, width:], alone[0, len(row) :]), "padding counts as no token seen"


def test_going_on_from_a_state(model):
    tokens = tokens_for(model, rows=2, length=7)
    _, state = model(tokens[:, :4], return_state=True)
    out = model.generate(tokens[:, 4:], max_new_tokens=5, initial_state=state, **GREEDY)
    assert torch.equal(out[:, 3:], model.generate(tokens, max_new_tokens=5, **GREEDY)[:, 7:])


# Hooks -------------------------------------------------------------------------------------------------------


def test_hooks_fire_at_each_step(model):
    tokens, lengths = tokens_for(model, rows=1, length=4), []
    double = [("blocks.0.mixer.hook_x", lambda v, hook: v * 2)]
    with model.hooks(fwd_hooks=[("hook_embed", lambda v, hook: lengths.append(v.shape[1])), *double]):
        out = model.generate(tokens, max_new_tokens=5, **GREEDY)
    assert lengths == [4, 1, 1, 1, 1]
    assert torch.equal(out, by_hand(model, tokens, 5, double))


@pytest.mark.parametrize("model", WITH_STATES, indirect=True)
def test_a_state_hook_fires_in_the_call_that_holds_its_position(model):
    tokens, fired = tokens_for(model, rows=1, length=4), []

    def note(h, hook):
        fired.append(hook.name.rpartition(".")[2])

    with model.hooks(fwd_hooks=[(f"blocks.1.mixer.hook_h.{t}", note) for t in (6, 2, 3, -1, -4, 99)]):
        model.generate(tokens, max_new_tokens=5, **GREEDY)
    assert sorted(fired) == sorted(["2", "3", "-4", "6", *["-1"] * 5])
    with pytest.raises(IndexError, match="position 6 is out of range, this call has 4"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_h.6", note)])


@pytest.mark.parametrize("model", WITH_STATES, indirect=True)
@pytest.mark.parametrize("t", [1, 3, 5])
def test_a_state_edit_while_generating_equals_one_forward_pass(model, t):
    tokens = tokens_for(model, rows=2, length=4)
    hooks = [(f"blocks.0.mixer.hook_h.{t}", lambda h, hook: -3 * h)]
    with model.hooks(fwd_hooks=hooks):
        out = model.generate(tokens, max_new_tokens=6, **GREEDY)
    for n in range(4, 10):
        active = hooks if n > t else []
        logits = model.run_with_hooks(out[:, :n], fwd_hooks=active)
        assert torch.equal(logits[:, -1].argmax(-1), out[:, n])


@pytest.mark.parametrize("model", WITH_STATES, indirect=True)
def test_a_failing_hook_leaves_no_trace(model):
    tokens = tokens_for(model, rows=1, length=4)

    def broken(v, hook):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), model.hooks(fwd_hooks=[("blocks.0.mixer.hook_h.5", broken)]):
        model.generate(tokens, max_new_tokens=5, **GREEDY)
    with pytest.raises(IndexError, match="out of range"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mixer.hook_h.5", broken)])


# Types -------------------------------------------------------------------------------------------------------


def test_text_in_text_out():
    model = build("mamba", seed=1)
    model.tokenizer = word_tokenizer()
    options = {"max_new_tokens": 5, "do_sample": False, "verbose": False, "stop_at_eos": False}
    text = model.generate("the cat", **options)
    assert isinstance(text, str)
    assert text.startswith("the cat ")
    tokens = model.generate("the cat", return_type="tokens", **options)
    assert tokens.shape == (1, 7)
    assert model.to_string(tokens[0]) == text
    texts = model.generate(["the cat", "a"], **options)
    assert texts == [text, model.generate("a", **options)]
    assert model.generate(["the cat"], **options) == [text]
    assert model.generate(model.to_tokens("the cat"), return_type="str", **options) == text
    ids = model.generate([[4, 5]], **options)
    assert torch.equal(ids, tokens), "ids in, ids out"
    from_nothing = model.generate("", return_type="tokens", **options)
    assert from_nothing[0, 0] == model.bos_token_id


def test_rows_of_the_vocabulary_without_a_token_are_never_drawn():
    model = build("mamba", seed=1, d_vocab=40)
    model.tokenizer = word_tokenizer()
    with torch.no_grad():
        model.embed.weight[len(WORDS) :] *= 100  # logits of padding rows would win otherwise
    tokens = torch.randint(0, len(WORDS), (2, 4))
    for options in ({"do_sample": False}, {"top_k": 5}, {"temperature": 5.0}):
        out = model.generate(tokens, max_new_tokens=20, verbose=False, stop_at_eos=False, **options)
        assert out.max() < len(WORDS)


def test_eos_of_the_tokenizer_ends_a_text():
    model = build("mamba2", seed=1)
    model.tokenizer = word_tokenizer()
    always_eos = [
        ("hook_logits", lambda v, hook: torch.nn.functional.one_hot(torch.ones_like(v[..., 0]).long(), 17) * 9.0)
    ]
    with model.hooks(fwd_hooks=[(n, lambda v, hook, fn=fn: fn(v, hook).to(v.dtype)) for n, fn in always_eos]):
        assert model.generate("the cat", max_new_tokens=9, do_sample=False, verbose=False) == "the cat"
        tokens = model.generate("the cat", max_new_tokens=9, do_sample=False, verbose=False, return_type="tokens")
    assert tokens.tolist() == [[4, 5, 1]]


def test_wrong_options(model):
    tokens = tokens_for(model)
    for options, message in (
        ({"max_new_tokens": -1}, "max_new_tokens must be 0 or more, got -1"),
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_k": 0}, "top_k must be 1 or more, got 0"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_p": 1.5}, "top_p must be above 0 and at most 1, got 1.5"),
        ({"return_type": "text"}, "return_type must be .* got 'text'"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(tokens, verbose=False, **options)
    with pytest.raises(TypeError, match="max_tokens"):
        model.generate(tokens, max_tokens=3)


def test_generation_takes_no_gradients_and_its_steps_equal_the_forward(model):
    model = build("mamba", seed=2).double()
    tokens = tokens_for(model, rows=1, length=3)
    seen = []
    with model.hooks(fwd_hooks=[("hook_logits", lambda v, hook: seen.append(v))]):
        out = model.generate(tokens, max_new_tokens=4, **GREEDY)
    assert not any(v.requires_grad for v in seen)
    assert relative(torch.cat(seen, 1), model(out[:, :-1]).detach()) < 1e-12
