"""Documents packed into one row: at every site, in the loss and in gradients what each is in a row of its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_mamba.hooks.site_name import SiteName
from tests.hooked_mamba.tiny import TINY, build, tokens_for
from tests.kinds import MIXERS, RECURRENCES, WITH_STATES

LENGTHS = ((5, 1, 2, 4), (3, 9), (12,))
"""Of the documents of each row: of one token, of fewer than the convolution has taps, of more; a row of one alone."""

KINDS = tuple(kind if kind in RECURRENCES else pytest.param(kind, marks=pytest.mark.slow) for kind in TINY)
STATEFUL = [kind for kind in TINY if kind not in set(MIXERS) - set(WITH_STATES)]


def packed(model) -> tuple[Tensor, Tensor]:
    tokens = tokens_for(model, rows=len(LENGTHS), length=12)
    ids = torch.stack([torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in LENGTHS])
    return tokens, ids * 7 - 3  # any integers


def documents() -> list[tuple[int, slice]]:
    """(row, columns) of each."""
    found = []
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            found.append((row, slice(start, start + length)))
            start += length
    return found


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("edited", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fused", "materialised"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_site_is_that_of_each_document_alone(kind, edited):
    model = build(kind).double()
    tokens, ids = packed(model)
    same = [("blocks.*", lambda value, hook: value)] if edited else []
    names = list(model.hook_dict)
    _, cache = model.run_with_cache(tokens, document_ids=ids, names_filter=names, fwd_hooks=same)
    for row, columns in documents():
        _, alone = model.run_with_cache(tokens[row : row + 1, columns], names_filter=names, fwd_hooks=same)
        for name in names:
            got, expected = cache[name][row : row + 1], alone[name]
            axis = model.hook_dict[name].position_axis
            got = got[(slice(None),) * axis + (columns,)]
            if SiteName.parse(name).hook in ("hook_pattern", "hook_attn_scores"):  # keys of its own, and none else
                others = torch.ones(got.shape[-1], dtype=torch.bool)
                others[columns] = False
                assert bool((got[..., others] == (0 if name.endswith("pattern") else -torch.inf)).all())
                got = got[..., columns]
            close(got, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients(kind):
    model = build(kind).double()
    tokens, ids = packed(model)
    loss, given = model(tokens, return_type="loss", document_ids=ids), dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    summed, pairs = torch.zeros((), dtype=torch.float64), 0
    for row, columns in documents():
        own = tokens[row : row + 1, columns]
        if own.shape[1] > 1:
            summed, pairs = summed + model(own, return_type="loss", loss_per_token=True).sum(), pairs + own.shape[1] - 1
    expected = torch.autograd.grad(summed / pairs, list(given.values()), allow_unused=True)
    close(loss, summed / pairs)
    for name, got, due in zip(given, gradients, expected, strict=True):
        assert (got is None) == (due is None), name
        if got is not None:
            close(got, due)
    per_token = model(tokens, return_type="loss", loss_per_token=True, document_ids=ids)
    assert torch.equal(per_token == 0, ids[:, 1:] != ids[:, :-1])


@pytest.mark.parametrize("kind", KINDS)
def test_states(kind):
    """The last document's comes back; the first continues the one that is given; single states are read and edited."""
    model = build(kind).double()
    tokens, ids = packed(model)
    past = tokens_for(model, rows=len(LENGTHS), length=4, seed=1)
    _, before = model(past, return_state=True)
    logits, after = model(tokens, document_ids=ids, initial_state=before, return_state=True)
    more = tokens_for(model, rows=len(LENGTHS), length=5, seed=2)
    going_on = model(more, initial_state=after)
    for row, lengths in enumerate(LENGTHS):
        first, last = tokens[row : row + 1, : lengths[0]], tokens[row : row + 1, 12 - lengths[-1] :]
        close(logits[row : row + 1, : lengths[0]], model(torch.cat([past[row : row + 1], first], 1))[:, 4:])
        whole = torch.cat([past[row : row + 1], first] if len(lengths) == 1 else [last], 1)
        close(going_on[row : row + 1], model(torch.cat([whole, more[row : row + 1]], 1))[:, -5:])
        assert int(after.seen[row]) == whole.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", STATEFUL)
def test_an_edited_state_stays_in_its_document(kind):
    model = build(kind).double()
    tokens, ids = packed(model)
    name = "blocks.0.mixer.hook_h.4"  # the last of row 0's first document, within row 1's second

    def doubled(h, hook):
        return 2 * h

    _, cache = model.run_with_cache(
        tokens, document_ids=ids, fwd_hooks=[(name, doubled)], names_filter=[name, "hook_logits"]
    )
    plain = model(tokens, document_ids=ids)
    close(cache["hook_logits"][0, 5:], plain[0, 5:])
    assert not torch.allclose(cache["hook_logits"][0, 4], plain[0, 4])
    own = model.run_with_hooks(tokens[1:2, 3:], fwd_hooks=[("blocks.0.mixer.hook_h.1", doubled)])
    close(cache["hook_logits"][1:2, 3:], own)


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", KINDS)
def test_together_with_padding(kind, side):
    model = build(kind).double()
    tokens, ids = packed(model)
    mask = torch.ones_like(tokens)
    real = slice(2, 12) if side == "left" else slice(0, 10)
    mask[:2] = 0
    mask[:2, real] = 1
    logits, state = model(tokens, document_ids=ids, attention_mask=mask, return_state=True)
    for row in (0, 1):
        alone, after = model(tokens[row : row + 1, real], document_ids=ids[row : row + 1, real], return_state=True)
        close(logits[row : row + 1, real], alone)
        more = tokens_for(model, rows=len(LENGTHS), length=3, seed=2)
        close(model(more, initial_state=state)[row : row + 1], model(more[row : row + 1], initial_state=after))


def test_what_is_refused(unchecked):
    model = build("mamba")
    tokens, ids = packed(model)
    with pytest.raises(ValueError, match=r"document_ids is \[3, 11\], expected \[3, 12\] like the tokens"):
        model(tokens, document_ids=ids[:, 1:])
    with pytest.raises(TypeError, match=r"document_ids must be integers.*float32"):
        model(tokens, document_ids=ids.float())
    _, cache = model.run_with_cache(tokens, document_ids=ids)
    with pytest.raises(ValueError, match="documents are packed into the rows of this cache"):
        cache.hidden_attention(0)
    with pytest.raises(ValueError, match="documents are packed"):
        cache.apply_slice_to_batch_dim(0).compute_ssm_state(0)

    model.blocks[1].mixer.__class__ = type("Leaky", (type(model.blocks[1].mixer),), {"packs": False, "title": "Leaky"})
    with pytest.raises(ValueError, match=r"document_ids: blocks\.1\.mixer \(Leaky\) cannot keep the documents"):
        model(tokens, document_ids=ids)
    model(tokens, document_ids=torch.zeros_like(ids))  # one document a row: nothing to keep apart
