"""Packed documents, and the last state of padded rows, in every family of hybrids."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import HookedHybrid
from tests.hooked_mamba.hybrids import tiny
from tests.hooked_mamba.tiny import relative

IDS = torch.tensor([[0] * 5 + [1] + [2] * 11, [0] * 9 + [1] * 8])
CASES = [case if case == "zamba2" else pytest.param(case, marks=pytest.mark.slow) for case in tiny.CASES]


@pytest.fixture(scope="module")
def model(request):
    return HookedHybrid.from_hf(tiny.twin(request.param)).double()


@pytest.mark.parametrize("model", CASES, indirect=True)
@torch.no_grad()
def test_every_site_is_that_of_each_document_alone(model):
    tokens = tiny.tokens_for()
    names = [name for name, point in model.hook_dict.items() if point.position_axis == 1]
    _, packed = model.run_with_cache(tokens, document_ids=IDS, names_filter=names)
    for row in range(2):
        for one in IDS[row].unique():
            columns = (IDS[row] == one).nonzero().flatten()
            _, alone = model.run_with_cache(tokens[row : row + 1, columns], names_filter=names)
            for name in names:
                assert relative(packed[name][row : row + 1, columns], alone[name]) < 1e-11, name


@pytest.mark.parametrize("model", CASES, indirect=True)
@torch.no_grad()
def test_the_last_state_of_a_padded_row_is_its_own(model):
    """`hook_h.-1` of a row that is padded on the right is edited behind its own last token."""
    states = [name for name in model.hook_dict if name.endswith("mixer.hook_h")]
    if not states:
        pytest.skip("no mixer here has a state")
    tokens, mask = tiny.tokens_for(), torch.ones(2, 17, dtype=torch.long)
    mask[1, 12:] = 0

    def doubled(h, hook):
        return 2 * h

    hooks = [(f"{states[0]}.-1", doubled)]
    padded = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
    alone = model.run_with_hooks(tokens[1:, :12], fwd_hooks=hooks)
    assert relative(padded[1:, :12], alone) < 1e-11
