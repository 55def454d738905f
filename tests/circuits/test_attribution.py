"""Sums and places of attributions: complete to rounding, and where dense finite differences of the replay say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from circuits import Channel, Direction, Feature, FrozenModel, Logit, attribute, attribute_heads
from saes import SparseCoder, mambacoder_config, sae_config
from tests.circuits.models import random_model, random_tokens
from tests.circuits.oracle import Off, Replay
from tests.kinds import MAMBA

ARCHITECTURES = {
    "topk": {"k": 3}, "batchtopk": {"k": 3}, "jumprelu": {}, "standard": {}, "gated": {}, "matryoshka": {"k": 3},
}  # fmt: skip


def caches(model, tokens, mask=None):
    with torch.no_grad():
        return model.run_with_cache(tokens, attention_mask=mask)


def coders_for(model, target="block", architecture="topk", seed=0, **options):
    d = model.cfg.d_model
    coders = []
    for layer in range(model.cfg.n_layers):
        cfg = mambacoder_config(
            layer, d, 11, architecture=architecture, target=target, **ARCHITECTURES[architecture], **options
        )
        coder = SparseCoder(cfg, seed=seed + layer).double()
        generator = torch.Generator().manual_seed(seed + layer)
        with torch.no_grad():
            for name, parameter in coder.named_parameters():
                if parameter.ndim == 1 or name == "W_skip":
                    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
                    parameter.add_(0.2 * noise.abs())
        coders.append(coder)
    return coders


@pytest.mark.parametrize("seed", range(12))
def test_parts_sum_to_their_targets(seed):
    model = random_model(seed)
    tokens, n = random_tokens(seed, batch=3, length=8), model.cfg.n_layers
    vector = torch.randn(model.cfg.d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    targets = [Logit(3), Logit(5, 4, minus=2), Direction(vector, n - 1, 5), Direction(vector, n - 1, 2, "out")]
    found = attribute_heads(model, tokens, targets)
    assert found.residual.abs().max() < 1e-10
    logits, cache = caches(model, tokens)
    assert torch.equal(found.target[:3], logits[:, -1, 3])
    assert torch.allclose(found.target[9:], cache[f"blocks.{n - 1}.mixer.hook_out_proj"][:, 2] @ vector)
    assert found.embeddings.shape == (12, 8)
    for layer in range(n):
        by_token, by_scan = found.token_heads[layer].sum((1, 2)), found.heads[layer].sum((1, 2))
        assert by_token.shape == by_scan.shape == (12,)


def check_places(model, tokens, row, mask=None, taps=6):
    """Every embedding, every head and some taps against differences of replays; all numbers there are in size 1."""
    attention = None if mask is None else torch.from_numpy(mask).long()
    frozen = FrozenModel(model, tokens, attention_mask=attention)
    found = attribute(frozen, targets=[Logit(3)])
    _, cache = caches(model, tokens, attention)
    replay = Replay(model, cache, row, None if mask is None else mask[row])
    whole = replay.logit(3, -1)
    assert abs(whole - float(found.target[row])) < 1e-9
    for position in range(tokens.shape[1]):
        effect = whole - replay.logit(3, -1, Off(embeddings={position}))
        assert abs(effect - float(found.embeddings[row, position])) < 1e-6
    for layer, heads in found.heads.items():
        for s in range(tokens.shape[1]):
            for e in range(model.cfg.E):
                effect = whole - replay.logit(3, -1, Off(u={(layer, s, e)}))
                assert abs(effect - float(heads[row, s, e])) < 1e-6
    draw = np.random.default_rng(0)
    K = model.cfg.d_conv
    for layer, heads in found.token_heads.items():
        for _ in range(taps):  # all taps of one token and channel together
            s, e = int(draw.integers(tokens.shape[1])), int(draw.integers(model.cfg.E))
            through = {(layer, s + k, k, e) for k in range(K)}
            effect = whole - replay.logit(3, -1, Off(taps=through))
            assert abs(effect - float(heads[row, s, e])) < 1e-6


@pytest.mark.parametrize("seed", range(100, 106))
def test_places_are_those_of_finite_differences(seed):
    check_places(random_model(seed, n_layers=2), random_tokens(seed, batch=2, length=5), row=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(200, 400))
def test_places_on_two_hundred_models(seed):
    check_places(random_model(seed), random_tokens(seed, batch=2, length=6), row=seed % 2)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", MAMBA)
def test_padding(side, family):
    model, tokens = random_model(7, family, n_layers=2), random_tokens(7, batch=2, length=7)
    mask = np.ones((2, 7), bool)
    mask[0, slice(0, 3) if side == "left" else slice(5, 7)] = False
    attention = torch.from_numpy(mask).long()
    position = -1 if side == "left" else 4
    found = attribute_heads(model, tokens, Logit(3, position), attention_mask=attention)
    assert found.residual.abs().max() < 1e-10
    alone = attribute_heads(model, tokens[:1, mask[0]], Logit(3))
    assert torch.allclose(found.embeddings[0, mask[0]], alone.embeddings[0], atol=1e-12)
    if side == "left":
        check_places(model, tokens, row=0, mask=mask, taps=2)


@pytest.mark.parametrize("family", MAMBA)
def test_memory_before_the_first_position(family):
    model, tokens = random_model(3, family, n_layers=2), random_tokens(3, batch=2, length=9)
    with torch.no_grad():
        _, state = model(tokens[:, :5], return_state=True)
    found = attribute_heads(model, tokens[:, 5:], Logit(3), initial_state=state)
    assert found.residual.abs().max() < 1e-10
    assert all(float(part.abs().max()) > 0 for part in found.initial.values())
    whole = attribute_heads(model, tokens, Logit(3))
    last = model.cfg.n_layers - 1
    # Seen from the last layer, the memory holds all that its earlier positions wrote, biases of the convolution too.
    assert torch.allclose(found.heads[last], whole.heads[last][:, 5:], atol=1e-10)
    early = whole.heads[last][:, :5].sum((1, 2))
    late = found.initial[last] - _taps_of_the_past(model, tokens, last, whole, found)
    assert torch.allclose(early, late, atol=1e-10)


def _taps_of_the_past(model, tokens, layer, whole, found):
    """What the convolution's inputs before position 5 send to later positions, in the last layer."""
    frozen = FrozenModel(model, tokens)
    mixer = frozen.chain(layer)
    ub = torch.where(mixer.u == 0, 0, whole.heads[layer] / mixer.u)
    total, K = torch.zeros(2, dtype=torch.float64), model.cfg.d_conv
    for t in range(5, 9):
        for k in range(K):
            if 0 <= t - k < 5:
                term = ub[:, t] * mixer.path.sigma[:, t] * mixer.path.taps[:, K - 1 - k] * mixer.p[:, t - k]
                total += term.sum(1)
    return total


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("target", ["block", "local"])
@pytest.mark.parametrize("seed", [0, 1, 2, 3])
def test_coders(architecture, target, seed):
    model, tokens = random_model(seed), random_tokens(seed, batch=2, length=6)
    mask = torch.ones(2, 6, dtype=torch.long)
    mask[1, :2] = 0
    options = {"skip": seed % 2 == 0, "reads": ("normalized", "resid")[seed // 2]}
    coders = coders_for(model, target, architecture, seed, **options)
    deep = coders[-1]
    found = attribute(model, coders, tokens, [Logit(3), Feature(deep, 4, 5)], attention_mask=mask)
    assert found.residual.abs().max() < 1e-10
    assert set(found.features) == set(range(model.cfg.n_layers))
    assert (set(found.heads) == set()) == (target == "block")
    with torch.no_grad():
        _, cache = caches(model, tokens, mask)
        expected = deep.preact(cache[deep.cfg.in_site][:, 5])[:, 4]
    assert torch.allclose(found.target[2:], expected, atol=1e-12)
    for layer, effects in found.features.items():
        assert effects.shape[:2] == (4, 6)
        if layer >= deep.cfg.layer:
            assert (effects[2:] == 0).all()
    # Behind the last layer there is only the final norm: what a latent adds is z_j d_j, read by the logit.
    last = model.cfg.n_layers - 1
    reading = model.unembed.weight[3] * model.ln_final.weight / cache["ln_final.hook_scale"][:, -1]
    with torch.no_grad():
        z = deep.encode(cache[deep.cfg.in_site][:, -1])
        by_latent = z * (reading @ deep.W_dec.t())
    codes = found.codes[last]
    spread = torch.zeros_like(z).scatter_add_(1, codes.indices[:, -1], found.features[last][:2, -1])
    assert torch.allclose(spread, by_latent, atol=1e-12)


def test_an_sae_on_a_mixers_output():
    model, tokens = random_model(1, n_layers=3), random_tokens(1, batch=2)
    cfg = sae_config("blocks.1.mixer.hook_out_proj", model.cfg.d_model, 12, architecture="topk", k=4)
    sae = SparseCoder(cfg, seed=1).double()
    found = attribute(model, [sae], tokens, [Logit(3), Feature(sae, 2)])
    assert found.residual.abs().max() < 1e-10
    assert (found.features[1][2:] == 0).all()  # its own latents do not explain what it reads
    assert float(found.heads[1][2:].abs().max()) > 0
    pieces = attribute(model, [sae], tokens, [Logit(3), Feature(sae, 2)], batch=1)
    assert torch.allclose(pieces.heads[1], found.heads[1])
    assert torch.allclose(pieces.embeddings, found.embeddings)


def test_float32_on_the_bundled_model():
    from hooked_mamba import HookedMamba

    model = HookedMamba.from_pretrained("tinystories-4l")
    found = attribute_heads(model, "I like to eat toast for breakfast. I'm so", Logit(" hungry"))
    assert float(found.residual.abs().max()) < 1e-4
    assert len(found.top_heads(5)) == 5


def test_errors_say_what_is_wrong():
    model, tokens = random_model(2, n_layers=2), random_tokens(2)
    block, local = coders_for(model)[0], coders_for(model, "local")[0]
    with pytest.raises(ValueError, match="two coders for layer 0"):
        FrozenModel(model, tokens, [block, local])
    with pytest.raises(ValueError, match="mode 'split' needs a coder trained on target 'local'"):
        FrozenModel(model, tokens, [block], mode="split")
    with pytest.raises(ValueError, match="mode 'block' needs a coder for layer 1"):
        FrozenModel(model, tokens, [block], mode="block")
    with pytest.raises(ValueError, match="no target"):
        attribute(model, (), tokens, [])
    with pytest.raises(TypeError, match="expected a target"):
        attribute(model, (), tokens, ["hungry"])
    with pytest.raises(IndexError, match="position 9 is out of range for 7"):
        attribute_heads(model, tokens, Logit(3, 9))
    with pytest.raises(IndexError, match="token 99 is out of range"):
        attribute_heads(model, tokens, Logit(99))
    dt = SparseCoder(sae_config("blocks.0.mixer.hook_dt", 8, 12, architecture="topk", k=4), seed=1)
    with pytest.raises(ValueError, match=r"mixer.hook_dt cannot be traced"):
        attribute_heads(model, tokens, Feature(dt, 2))


@pytest.mark.parametrize("family", MAMBA)
@pytest.mark.parametrize("target", [None, "local"])
def test_heads_as_nodes(family, target):
    """Paths end at chosen heads, and each head traced on its own gives the rest of them back."""
    model, tokens = random_model(5, family, n_layers=2), random_tokens(5, batch=1, length=6)
    frozen = FrozenModel(model, tokens, [] if target is None else coders_for(model, target))
    draw = torch.Generator().manual_seed(0)
    nodes = {i: (torch.rand(6, model.cfg.E, generator=draw) < 0.4).double() for i in range(2)}
    whole = attribute(frozen, targets=Logit(3))
    direct = attribute(frozen, targets=Logit(3), nodes=nodes)
    assert direct.residual.abs().max() < 1e-10
    places = [(i, int(s), int(e)) for i in range(2) for s, e in nodes[i].nonzero()]
    traced = attribute(frozen, targets=[Channel(i, e, s) for i, s, e in places], nodes=nodes)
    assert traced.residual.abs().max() < 1e-10
    # Direct effects, followed from head to head down to the embeddings, are the effects without nodes.
    first = torch.cat([direct.node_heads[i][0] for i in range(2)])
    between = torch.cat([traced.node_heads[i] for i in range(2)], 1)
    values = traced.target.unsqueeze(1)
    weight = first @ torch.linalg.inv(torch.eye(len(places)) - between / values)
    through = direct.embeddings[0] + (weight / traced.target) @ traced.embeddings
    assert torch.allclose(through, whole.embeddings[0], atol=1e-10)


def test_coders_in_any_form():
    """One, a list, an iterator, or several by name."""
    model, tokens = random_model(5, n_layers=2), random_tokens(5, 1, 6)
    coders = coders_for(model, "block")
    expected = attribute(model, coders, tokens, Logit(3)).embeddings
    for given in (tuple(coders), iter(coders), {"a": coders[0], "b": coders[1]}):
        assert torch.equal(attribute(model, given, tokens, Logit(3)).embeddings, expected)
    assert list(FrozenModel(model, tokens, coders[0]).coded) == [coders[0].cfg.layer]
