"""One pass, chunks and steps; padding on either side; states that branch."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from hooked_mamba.state import ModelState
from tests.hooked_mamba.hybrids.tiny import CASES, tiny, tokens_for
from tests.hooked_mamba.tiny import relative

pytestmark = pytest.mark.usefixtures("fast")
FP64 = 1e-12


def everything(model, tokens: Tensor, **kwargs):
    (logits, state), cache = model.run_with_cache(tokens, names_filter=lambda name: True, return_state=True, **kwargs)
    return logits, cache, state


def keys_axis(model, name: str) -> int | None:
    """The axis of a site that counts keys: 3 of "b Q l m"."""
    axes = model.site(name).row.shape.split()
    return axes.index("m") if "m" in axes else None


def joined(model, name: str, pieces: list[Tensor], length: int) -> Tensor:
    """Pieces of a site along its positions; rows of patterns are padded: no key was there yet."""
    if keys_axis(model, name) is not None:
        empty = 0.0 if name.endswith("pattern") else -torch.inf
        pieces = [torch.nn.functional.pad(p, (0, length - p.shape[-1]), value=empty) for p in pieces]
    return torch.cat(pieces, model.site(name).row.position_axis)


def off(got: Tensor, expected: Tensor) -> float:
    assert torch.equal(got.isneginf(), expected.isneginf())
    return relative(got.nan_to_num(neginf=0), expected.nan_to_num(neginf=0))


@torch.no_grad()
@pytest.mark.parametrize(
    "cuts", [(0, 5, 6, 11, 17), (0, 1, 2, 3, 17), tuple(range(18))], ids=["chunks", "few", "steps"]
)
@pytest.mark.parametrize("case", CASES)
def test_chunks_and_steps_equal_one_pass_at_every_site(case, cuts):
    check_pieces(tiny(case).model, tokens_for(), cuts)


def check_pieces(model, tokens: Tensor, cuts: tuple[int, ...]) -> None:
    logits, cache, end = everything(model, tokens)
    length, state, found = tokens.shape[1], None, []
    for a, b in itertools.pairwise(cuts):
        out, piece, state = everything(model, tokens[:, a:b], initial_state=state)
        found.append((out, piece))
    assert relative(torch.cat([out for out, _ in found], 1), logits) < FP64
    for name in cache:
        assert off(joined(model, name, [c[name] for _, c in found], length), cache[name]) < FP64, name
    for mine, theirs in zip(state, end, strict=True):
        assert all(relative(a, b) < FP64 for (_, a), (_, b) in zip(mine.items(), theirs.items(), strict=True))
    assert state.seen.tolist() == end.seen.tolist() == [length] * len(tokens)


def part(model, name: str, value: Tensor, row: int, columns: slice) -> Tensor:
    """What one row has at its real columns, keys among them."""
    value = value[row : row + 1]
    keys, axis = keys_axis(model, name), model.site(name).row.position_axis
    value = value[(slice(None),) * axis + (columns,)]
    return value if keys is None else value[..., columns]


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("case", CASES)
def test_padding_gives_each_row_what_it_gets_alone(case, side):
    """At every site, and in the call behind it; whatever stands in the padding."""
    check_padding(tiny(case).model, side, (11, 7, 3))


def check_padding(model, side: str, lengths: tuple[int, int, int]) -> None:
    longest = max(lengths)
    long = tokens_for(rows=3, length=longest, seed=4)
    tokens, mask = torch.full((3, longest), 60), torch.zeros(3, longest, dtype=torch.long)
    spans = [slice(longest - n, longest) if side == "left" else slice(0, n) for n in lengths]
    for i, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        tokens[i, span], mask[i, span] = long[i, :n], 1
    logits, cache, state = everything(model, tokens, attention_mask=mask)
    more = tokens_for(rows=3, length=4, seed=5)
    after = model(more, initial_state=state)
    for i, (n, span) in enumerate(zip(lengths, spans, strict=True)):
        alone, single, memory = everything(model, long[i : i + 1, :n])
        assert relative(logits[i : i + 1, span], alone) < FP64
        for name in cache:
            assert off(part(model, name, cache[name], i, span), single[name]) < FP64, name
        assert relative(after[i : i + 1], model(more[i : i + 1], initial_state=memory)) < FP64
    assert state.seen.tolist() == list(lengths)


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_no_key_of_padding_is_looked_at(case):
    model = tiny(case).model
    names = [n for n in model.hook_dict if n.endswith("hook_pattern")]
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[0, :2], mask[1, 4:] = 0, 0
    _, cache = model.run_with_cache(tokens_for(length=6), names_filter=names, attention_mask=mask)
    for name in names:
        for row, hidden in ((0, slice(0, 2)), (1, slice(4, 6))):
            real = mask[row].bool()
            assert (cache[name][row][:, real][..., hidden] == 0).all()
        assert relative(cache[name].sum(-1), torch.ones_like(cache[name].sum(-1))) < FP64


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_a_state_branches(case):
    """Rows repeated, one state used twice, copies: no branch sees the tokens of another."""
    model, tokens = tiny(case).model, tokens_for(length=12)
    _, state = model(tokens[:, :5], return_state=True)
    branches = [tokens_for(length=7, seed=s) for s in (7, 8, 9)]
    expected = [model(torch.cat([tokens[:, :5], b], 1))[:, 5:] for b in branches]
    for start in (lambda: state, state.clone, lambda: state.rows([0, 1])):
        memories = [start() for _ in branches]
        got: list[list[Tensor]] = [[] for _ in branches]
        for t in range(7):  # in turns: each would overwrite what another had appended
            for i, branch in enumerate(branches):
                out, memories[i] = model(branch[:, t : t + 1], initial_state=memories[i], return_state=True)
                got[i].append(out)
        for pieces, want in zip(got, expected, strict=True):
            assert relative(torch.cat(pieces, 1), want) < FP64
    crossed = state.rows([1, 1, 0])
    rows = torch.cat([tokens[1:], tokens[1:], tokens[:1]])[:, :5]
    more = tokens_for(rows=3, length=4, seed=3)
    assert relative(model(more, initial_state=crossed), model(torch.cat([rows, more], 1))[:, 5:]) < FP64


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_stopping_and_starting_between_layers(case):
    model, tokens = tiny(case).model, tokens_for(length=6)
    for layer in range(model.cfg.n_layers + 1):
        resid = model(tokens, stop_at_layer=layer)
        assert relative(model(resid, start_at_layer=layer, tokens=tokens), model(tokens)) < FP64


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_other_shapes_is_refused(case):
    model = tiny(case).model
    _, state = model(tokens_for(length=4), return_state=True)
    with pytest.raises(ValueError, match="initial_state"):
        model(tokens_for(rows=3, length=2), initial_state=state)
    with pytest.raises(ValueError, match="layers"):
        model(tokens_for(length=2), initial_state=ModelState(list(state)[:-1], state.seen))


@torch.no_grad()
@pytest.mark.parametrize("case", CASES)
def test_the_fused_path_equals_the_materialised_one(case):
    """Attention by a fused kernel where nobody looks, by its pattern where somebody edits."""
    model, tokens = tiny(case).model, tokens_for(length=15)
    edit = [(lambda n: n.endswith(("hook_pattern", "hook_result")), lambda v, hook: v)]
    for kwargs in ({}, {"attention_mask": torch.tensor([[0] * 4 + [1] * 11, [1] * 12 + [0] * 3])}):
        fused = model(tokens, **kwargs)
        with model.hooks(fwd_hooks=edit):
            assert relative(model(tokens, **kwargs), fused) < FP64
