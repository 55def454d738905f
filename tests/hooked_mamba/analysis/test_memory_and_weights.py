"""Memory probes, factored matrices, composition scores, folded norms, utilities."""

from __future__ import annotations

import pytest
import torch

from hooked_mamba import utils
from hooked_mamba.analysis.memory_probes import half_life, layer_half_lives, receptive_field, saliency, write_survival
from hooked_mamba.analysis.weight_views import (
    channel_OV,
    fold_norms,
    head_OV,
    input_matrix,
    mixer_composition_scores,
    mixer_OV,
)
from hooked_mamba.factored_matrix import FactoredMatrix
from tests.hooked_mamba.analysis.models import every_family, model_for, run, two_families
from tests.hooked_mamba.tiny import relative, tokens_for


@two_families
def test_a_write_survives_as_the_states_say(family):
    """Against the model: a state changed at s differs afterwards by the survival times the change."""
    model, tokens, _, cache = run(family)
    name = "blocks.0.mixer.hook_h"
    _, plain = model.run_with_cache(tokens, names_filter=name)
    _, moved = model.run_with_cache(tokens, names_filter=name, fwd_hooks=[(f"{name}.2", lambda h, hook: h + 1)])
    difference = moved[name] - plain[name]
    survival = write_survival(cache, 0, 2, per_state=True)
    if family.startswith("mamba2"):
        survival = survival.unsqueeze(-1)
    assert relative(survival.expand_as(difference), difference) < 1e-10
    mean = write_survival(cache, 0, 2)
    assert (mean[:, 2] == 1).all()
    assert not mean[:, :2].any()


@two_families
def test_half_lives_and_saliency(family):
    model, _, _, cache = run(family, padded=True)
    life = half_life(cache, 1)
    A = model.blocks[1].mixer.A
    A = A.unsqueeze(-1) if A.ndim == 1 else A
    mean_dt = cache["dt", 1][1, 2:].mean(0)  # this row's first two positions are padding
    assert relative((mean_dt.unsqueeze(-1) * -A * life[1]).exp(), torch.full_like(life[1], 2.0)) < 1e-12
    assert layer_half_lives(cache).shape == (2, *life.shape)
    found = saliency(cache, 1)
    view = cache.scan_view(1)
    heads = view.B.repeat_interleave(view.n_lanes // view.B.shape[2], 2)
    written = torch.einsum("blh,blhn,blhp->blhpn", view.dt, heads, view.u).norm(dim=-1)
    assert relative(found.write, written.flatten(2).mean(-1)) < 1e-12
    assert relative(found.dt, cache["dt", 1].mean(-1)) < 1e-12
    assert found.B.shape == found.C.shape == (3, 7)


@two_families
def test_receptive_fields_by_counting(family):
    _model, _, _, cache = run(family)
    alpha = cache.hidden_attention(1, include_skip=False).abs()
    field = receptive_field(cache, 1)
    for b, h, t in ((0, 0, 6), (2, 3, 4), (1, 1, 0)):
        row = alpha[b, h, t, : t + 1]
        distances = torch.arange(t, -1, -1, dtype=row.dtype)
        assert field.mean_distance[b, t, h].item() == pytest.approx(((row * distances).sum() / row.sum()).item())
        reach, total = 0, row[t].item()
        while total < 0.9 * row.sum().item():
            reach += 1
            total += row[t - reach].item()
        assert field.reach[b, t, h].item() == reach
    one = receptive_field(cache, 1, -1, flow=True)
    assert one.reach.shape == (3, alpha.shape[1])


def test_factored_matrices():
    torch.manual_seed(0)
    A, B = torch.randn(4, 6, 3).double(), torch.randn(4, 3, 6).double()
    F = FactoredMatrix(A, B)
    dense = A @ B
    assert F.shape == dense.shape
    assert F.ndim == 3
    assert relative(F.AB, dense) == 0
    assert relative(F.norm(), dense.norm(dim=(-2, -1))) < 1e-12
    U, S, Vh = F.svd()
    assert relative(U * S.unsqueeze(-2) @ Vh, dense) < 1e-12
    assert relative(S, torch.linalg.svdvals(dense)[..., :3]) < 1e-12
    assert relative(F.eigenvalues.abs().sort().values, torch.linalg.eigvals(dense).abs().sort().values[..., 3:]) < 1e-10
    assert relative(F.T.AB, dense.transpose(-2, -1)) < 1e-12
    vector, matrix = torch.randn(6).double(), torch.randn(6, 5).double()
    assert relative(F @ vector, dense @ vector) < 1e-12
    assert relative(vector @ F.A[0] @ F.B[0], vector @ dense[0]) < 1e-12
    assert relative(F.__rmatmul__(vector), vector @ dense) < 1e-12
    assert relative((F @ matrix).AB, dense @ matrix) < 1e-12
    assert relative((F @ F).AB, dense @ dense) < 1e-12
    assert relative((2 * F).AB, 2 * dense) < 1e-12
    assert relative(F[1].AB, dense[1]) == 0
    assert relative(F[1, 2:4, -1].AB, dense[1, 2:4, -1:]) < 1e-12
    assert relative(F.make_even().AB, dense) < 1e-12
    assert relative(F.collapse_l().transpose(-2, -1) @ F.collapse_l(), dense.transpose(-2, -1) @ dense) < 1e-12
    assert relative(F.collapse_r() @ F.collapse_r().transpose(-2, -1), dense @ dense.transpose(-2, -1)) < 1e-12
    assert relative(F.get_corner(2), dense[:, :2, :2]) < 1e-12
    with pytest.raises(ValueError, match="inner widths differ"):
        FactoredMatrix(A, A)


@every_family
def test_views_and_composition_scores(family):
    model = model_for(family, n_layers=3)
    OV = mixer_OV(model).AB
    assert relative(channel_OV(model).AB.sum(1), OV) < 1e-12
    senders = OV
    if family.startswith("mamba2"):
        assert relative(head_OV(model).AB.sum(1), OV) < 1e-12
        senders = head_OV(model).AB
    for input in ("x", "z", "B", "C", "dt"):
        scores = mixer_composition_scores(model, input)
        R = input_matrix(model, input).AB
        expected = (OV[0] @ R[2]).norm() / (OV[0].norm() * R[2].norm())
        assert scores[0, 2].item() == pytest.approx(expected.item(), rel=1e-10)
        assert not scores.tril().any()
    if family.startswith("mamba2"):
        heads = mixer_composition_scores(model, "C", by="head")
        expected = (senders[1, 2] @ input_matrix(model, "C").AB[2]).norm()
        expected /= senders[1, 2].norm() * input_matrix(model, "C").AB[2].norm()
        assert heads[1, 2, 2].item() == pytest.approx(expected.item(), rel=1e-10)


@every_family
def test_the_read_matrix_is_what_the_model_reads(family):
    model, _, _, cache = run(family, use_bias=False)
    read = cache["normalized", 1] @ input_matrix(model, "x").AB[1]
    assert relative(read, cache["x_pre", 1][..., : model.cfg.E]) < 1e-12
    wrote = (cache["normalized", 1, "mixer.norm"] if family.startswith("mamba2") else cache["y_gated", 1]) @ mixer_OV(
        model
    ).B[1]
    assert relative(wrote, cache["out_proj", 1]) < 1e-12


@every_family
@pytest.mark.parametrize("center", [False, True])
def test_folded_norms_give_equal_log_probs(family, center):
    model = model_for(family)
    folded = fold_norms(model, center_unembed=center)
    tokens = tokens_for(model)
    assert relative(folded(tokens).log_softmax(-1), model(tokens).log_softmax(-1)) < 1e-12
    norms = [m for name, m in folded.named_parameters() if name.endswith("norm.weight") or "ln_final" in name]
    assert len(norms) >= 3
    assert all((w == 1).all() for w in norms)
    if center:
        assert folded.W_U.mean(-1).abs().max() < 1e-12
    assert relative(folded.W_E, model.W_E) == 0


class Letters:
    """A tokenizer of single letters."""

    def __len__(self):
        return 17

    def __call__(self, text, add_special_tokens=True):
        return {"input_ids": [(ord(c) - ord("a") + 1) % 17 if c != " " else 0 for c in text]}

    def decode(self, ids, **options):
        return "".join(" abcdefghijklmnop"[i] for i in ids)


def test_test_prompt_says_rank_and_probability(capsys):
    model = model_for("mamba")
    model.tokenizer = Letters()
    assert utils.test_prompt("abc", ["de", "f"], model, top_k=3) is None  # a notebook would show it again
    result = utils.answer_tokens("abc", ["de", "f"], model, top_k=3)
    assert [len(one) for one in result] == [3, 2]  # a space was put in front
    first = result[0][1]
    logits = model("abc ")[0, -1]
    assert first.token == "d"
    assert first.prob == pytest.approx(logits.softmax(-1)[4].item())
    assert first.rank == int((logits > logits[4]).sum())
    assert first.top[0][0] == Letters().decode([int(logits.argmax())])
    out = capsys.readouterr().out
    assert out.count("Rank:") == 5
    assert f"Rank: {first.rank:<8} Logit: {first.logit:5.2f} Prob: {first.prob:6.2%} Token: |d|" in out


def test_models_are_compared():
    model, tokens, logits, _ = run("mamba", tie_embeddings=False)
    same = utils.compare_models(model, fold_norms(model, center_unembed=True), tokens)
    assert same.max_logit_difference < 1e-12
    assert same.same_top == 1
    other = model_for("mamba", tie_embeddings=False)
    other.unembed.weight.data *= 2
    apart = utils.compare_models(model, other, tokens)
    assert apart.losses[0] == pytest.approx(model(tokens, return_type="loss").item())
    p, q = logits.log_softmax(-1), (2 * logits).log_softmax(-1)
    assert apart.kl == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item())
    assert "nats" in apart._repr_html_()
    right = utils.lm_accuracy(logits, tokens, per_token=True)
    assert utils.lm_accuracy(logits, tokens).item() == pytest.approx(right.float().mean().item())
