"""Models whose weights are written by hand, so that their circuits are known.

latch      ... ? -> the last marked value. With `via="marker"` the marker stands before its value and is seen through
           the convolution; with `via="value"` it stands behind and the value comes through the convolution.
induction  ... a b ... a -> b, in two layers: the first copies each token to its successor, the second stores values
           under their predecessors.
echo       ... a -> a, said by the last position itself: by the scan, which forgets at every step, or by the skip D.

Distractors are channels that read fillers and values (in induction every token) and write into the space that the
logits read. Rotations turn the residual stream's basis, permutations the channels' order; both leave what the model
computes as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_mamba import HookedMamba, HookedMamba2, Mamba2Config, MambaConfig
from saes import SparseCoder, mambacoder_config

VALUES, FILLERS, NOISE, K = 5, 4, 6, 3
MARKER, QUERY = VALUES + FILLERS, VALUES + FILLERS + 1
# The residual stream: values, marker, query, a constant, noise, and what the logits read.
IS_MARKER, IS_QUERY, ONE, NOISE_AT, OUT = VALUES, VALUES + 1, VALUES + 2, VALUES + 3, VALUES + 3 + NOISE
WIDTH = OUT + VALUES
Via = Literal["marker", "value"]


@dataclass(frozen=True)
class Compiled:
    """A model and where its channels are."""

    model: Any
    channel_of: list[int]
    """The channel, after permutation, that holds each value in the last layer."""


@dataclass(frozen=True)
class Case:
    """A prompt and its circuit."""

    tokens: Tensor
    answer: int
    other: int
    """Another candidate."""
    value_at: int
    """The token that holds the answer."""
    scan_at: int
    """The position at which it enters the scan."""
    chosen_by: list[int]
    """Tokens that act through selection alone."""


def latch_cases(n: int, via: Via, seed: int) -> list[Case]:
    """Prompts of 14 tokens with two marked values and several unmarked ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int, count: int) -> list[int]:
        return torch.randperm(below, generator=generator)[:count].tolist()

    cases = []
    for _ in range(n):
        tokens = torch.randint(0, VALUES + FILLERS, (14,), generator=generator)
        tokens[-1] = QUERY
        first, last = draw(VALUES, 2)
        i, j = sorted(k * 3 + 1 for k in draw(4, 2))  # places with room before them and behind
        for at, value in ((i, first), (j, last)):
            tokens[at] = value
            tokens[at - 1 if via == "marker" else at + 1] = MARKER
        marker = j - 1 if via == "marker" else j + 1
        cases.append(Case(tokens[None], last, first, j, j if via == "marker" else marker, [marker]))
    return cases


def latch(family: str, via: Via, seed: int, distractors: bool = False, turned: bool = False) -> Compiled:
    """The latch in either family."""
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {
        "d_model": WIDTH, "n_layers": 1, "d_vocab": QUERY + 1, "d_conv": K, "tie_embeddings": False, "d_state": 2,
    }  # fmt: skip
    model: HookedMamba | HookedMamba2
    if family == "mamba":
        model = HookedMamba(MambaConfig(**common, d_inner=2 * VALUES + 2, dt_rank=1), seed=0)
    else:
        cfg = Mamba2Config(**common, d_inner=2 * VALUES, head_dim=VALUES, n_groups=2, norm_groups=1)
        model = HookedMamba2(cfg, seed=0)
    model = model.double()
    with torch.no_grad():
        _zero(model)
        _embeddings(model, generator, distractors)
        mixer = model.blocks[0].mixer
        (_latch_mamba if family == "mamba" else _latch_mamba2)(mixer, via, generator, distractors)
        channels = torch.arange(model.cfg.E)
        if turned:
            rotate(model, generator)
            channels = permute(mixer, generator)
    return Compiled(model, channels.argsort()[:VALUES].tolist())


def _zero(model: Any) -> None:
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_final" not in name:
            parameter.zero_()


def _embeddings(model: Any, generator: torch.Generator, distractors: bool) -> None:
    """Tokens of one norm each: a constant, and a unit vector that says what they are."""
    embed = model.embed.weight
    noise = torch.randn(VALUES + FILLERS, NOISE, generator=generator, dtype=embed.dtype)
    noise = noise / noise.norm(dim=1, keepdim=True)
    embed[:, ONE] = 1
    for value in range(VALUES):
        embed[value, value] = 0.8 if distractors else 1
        embed[value, NOISE_AT:OUT] = noise[value] * (0.6 if distractors else 0)
    embed[VALUES:MARKER, NOISE_AT:OUT] = noise[VALUES:]
    embed[MARKER, IS_MARKER] = embed[QUERY, IS_QUERY] = 1
    model.unembed.weight[:VALUES, OUT:] = 5 * torch.eye(VALUES, dtype=embed.dtype)


def _latch_mamba(mixer: Any, via: Via, generator: torch.Generator, distractors: bool) -> None:
    """Channels: values, distractors, marker, constant."""
    E, N, seen, one = 2 * VALUES + 2, 2, 2 * VALUES, 2 * VALUES + 1
    values, noisy = slice(0, VALUES), slice(VALUES, 2 * VALUES)
    W_in, taps = mixer.in_proj.weight, mixer.conv1d.weight[:, 0]
    value_tap, marker_tap = (K - 1, K - 2) if via == "marker" else (K - 2, K - 1)
    W_in[values, :VALUES] = torch.eye(VALUES, dtype=W_in.dtype)
    W_in[seen, IS_MARKER] = W_in[one, ONE] = 1
    W_in[E:, IS_QUERY] = 1  # gates open at the query alone
    taps[values, value_tap] = taps[seen, marker_tap] = taps[one, K - 1] = 1
    mixer.x_proj.weight[0, seen] = 20
    mixer.x_proj.weight[1 : 1 + N, one] = torch.tensor([0.5, 0.2], dtype=W_in.dtype)
    mixer.x_proj.weight[1 + N :, one] = torch.tensor([0.5, 0.2], dtype=W_in.dtype)
    # dt about 20 where a marker is seen: all before is forgotten; about 1e-9 elsewhere: nothing is written.
    mixer.dt_proj.weight[values] = 1
    mixer.dt_proj.bias[values] = -20
    mixer.out_proj.weight[OUT:, values] = 0.3 * torch.eye(VALUES, dtype=W_in.dtype)
    if distractors:
        W_in[noisy, NOISE_AT:OUT] = torch.randn(VALUES, NOISE, generator=generator, dtype=W_in.dtype)
        taps[noisy] = torch.randn(VALUES, K, generator=generator, dtype=W_in.dtype)
        mixer.dt_proj.bias[noisy] = torch.randn(VALUES, generator=generator, dtype=W_in.dtype)
        mixer.D[noisy] = 1
        writes = torch.randn(VALUES, VALUES, generator=generator, dtype=W_in.dtype)
        mixer.out_proj.weight[OUT:, noisy] = 0.3 * writes


def _latch_mamba2(mixer: Any, via: Via, generator: torch.Generator, distractors: bool) -> None:
    """Two heads with groups of their own: values, distractors. dt sees no convolution here, so a marker before its
    value forgets by dt and lets the next token write by B."""
    E, N, H = 2 * VALUES, 2, 2
    values, noisy = slice(0, VALUES), slice(VALUES, E)
    W_in, taps = mixer.in_proj.weight, mixer.conv1d.weight[:, 0]
    z, x, B, C, dt = W_in.split([E, E, 2 * N, 2 * N, H])
    x_taps, B_taps, C_taps = taps.split([E, 2 * N, 2 * N])
    z[:, IS_QUERY] = 1
    x[values, :VALUES] = torch.eye(VALUES, dtype=W_in.dtype)
    B[N:, ONE] = C[:, ONE] = 1
    B_taps[:, K - 1] = C_taps[:, K - 1] = 1
    if via == "marker":
        x_taps[values, K - 1] = 1
        B[:N, IS_MARKER] = 1
        B_taps[:N] = 0
        B_taps[:N, K - 2] = 1
        dt[0, IS_MARKER], dt[0, :VALUES] = 1000, 10
    else:
        x_taps[values, K - 2] = 1
        B[:N, ONE] = 1
        dt[0, IS_MARKER] = 1000
    mixer.dt_bias[0] = -20
    mixer.A_log[0] = torch.tensor(0.02).log()
    mixer.out_proj.weight[OUT:, values] = torch.eye(VALUES, dtype=W_in.dtype)
    if distractors:
        x[noisy, NOISE_AT:OUT] = torch.randn(VALUES, NOISE, generator=generator, dtype=W_in.dtype)
        x_taps[noisy] = torch.randn(VALUES, K, generator=generator, dtype=W_in.dtype)
        mixer.D[1] = 1
        writes = torch.randn(VALUES, VALUES, generator=generator, dtype=W_in.dtype)
        mixer.out_proj.weight[OUT:, noisy] = 0.1 * writes


def rotate(model: Any, generator: torch.Generator) -> None:
    """Another orthonormal basis of the residual stream; norms' weights are 1."""
    weight = model.embed.weight
    Q = torch.linalg.qr(torch.randn(weight.shape[1], weight.shape[1], generator=generator, dtype=weight.dtype))[0]
    weight.copy_(weight @ Q)
    model.unembed.weight.copy_(model.unembed.weight @ Q)
    for block in model.blocks:
        block.mixer.in_proj.weight.copy_(block.mixer.in_proj.weight @ Q)
        block.mixer.out_proj.weight.copy_(Q.t() @ block.mixer.out_proj.weight)


def permute(mixer: Any, generator: torch.Generator) -> Tensor:
    """Channels in another order (in Mamba-2 heads, with their groups, and channels inside them): new -> old."""
    cfg, weight = mixer.cfg, mixer.in_proj.weight
    E = cfg.E
    if isinstance(cfg, MambaConfig):
        order = torch.randperm(E, generator=generator)
        weight.copy_(weight[torch.cat([order, E + order])])
        mixer.conv1d.weight.copy_(mixer.conv1d.weight[order])
        mixer.conv1d.bias.copy_(mixer.conv1d.bias[order])
        mixer.x_proj.weight.copy_(mixer.x_proj.weight[:, order])
        for parameter in (mixer.dt_proj.weight, mixer.dt_proj.bias, mixer.A_log, mixer.D):
            parameter.copy_(parameter[order])
    else:
        heads = torch.randperm(cfg.H, generator=generator)
        order = torch.cat([h * cfg.P + torch.randperm(cfg.P, generator=generator) for h in heads])
        states = (heads[:, None] * cfg.d_state + torch.arange(cfg.d_state)).flatten()  # a group for each head
        n = len(states)
        conv = torch.cat([order, E + states, E + n + states])
        weight.copy_(weight[torch.cat([order, E + conv, 2 * E + 2 * n + heads])])
        mixer.conv1d.weight.copy_(mixer.conv1d.weight[conv])
        mixer.conv1d.bias.copy_(mixer.conv1d.bias[conv])
        for parameter in (mixer.dt_bias, mixer.A_log, mixer.D):
            parameter.copy_(parameter[heads])
    mixer.out_proj.weight.copy_(mixer.out_proj.weight[:, order])
    return order


def echo_cases(n: int, seed: int) -> list[Case]:
    """Prompts of 10 tokens that end with two different values, the last of which is the answer."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in range(n):
        tokens = torch.randint(0, VALUES + FILLERS, (10,), generator=generator)
        other, answer = torch.randperm(VALUES, generator=generator)[:2].tolist()
        tokens[-2], tokens[-1] = other, answer
        cases.append(Case(tokens[None], answer, other, 9, 9, []))
    return cases


def echo(family: str, via: Literal["scan", "skip"], seed: int, distractors: bool = True) -> Compiled:
    """One layer in either family, turned."""
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {
        "d_model": WIDTH, "n_layers": 1, "d_vocab": QUERY + 1, "d_conv": K, "tie_embeddings": False, "d_state": 1,
    }  # fmt: skip
    E, values, noisy = 2 * VALUES, slice(0, VALUES), slice(VALUES, 2 * VALUES)
    model: Any
    if family == "mamba":  # one channel more, from which B and C are read
        model = HookedMamba(MambaConfig(**common, d_inner=E + 1, dt_rank=1), seed=0)
    else:
        cfg = Mamba2Config(**common, d_inner=E, head_dim=VALUES, n_groups=2, norm_groups=1)
        model = HookedMamba2(cfg, seed=0)
    model = model.double()
    with torch.no_grad():
        _zero(model)
        _embeddings(model, generator, distractors)
        mixer = model.blocks[0].mixer
        W_in, taps = mixer.in_proj.weight, mixer.conv1d.weight[:, 0]
        eye = torch.eye(VALUES, dtype=W_in.dtype)
        if family == "mamba":
            x, z = W_in.split(E + 1)
            x[E, ONE] = taps[E, K - 1] = 1
            mixer.x_proj.weight[1:, E] = 0.5
            own, others, dt_bias = values, noisy, mixer.dt_proj.bias
        else:
            z, x, B, C, _ = W_in.split([E, E, 2, 2, 2])
            B[:, ONE] = C[:, ONE] = 1
            taps[E:, K - 1] = 1
            own, others, dt_bias = slice(0, 1), slice(1, 2), mixer.dt_bias
        z[:, ONE] = 1
        x[values, :VALUES] = eye
        taps[values, K - 1] = 1
        dt_bias[own], dt_bias[others] = 10 if via == "scan" else -20, -4
        mixer.D[own], mixer.D[others] = float(via == "skip"), 1
        mixer.out_proj.weight[OUT:, values] = eye
        if distractors:
            x[noisy, NOISE_AT:OUT] = 0.3 * torch.randn(VALUES, NOISE, generator=generator, dtype=W_in.dtype)
            taps[noisy] = torch.randn(VALUES, K, generator=generator, dtype=W_in.dtype)
            writes = torch.randn(VALUES, VALUES, generator=generator, dtype=W_in.dtype)
            mixer.out_proj.weight[OUT:, noisy] = 0.1 * writes
        rotate(model, generator)
        channels = permute(mixer, generator)
    return Compiled(model, channels.argsort()[:VALUES].tolist())


def echo_coder(model: Any) -> SparseCoder:
    """A MambaCoder of an echo's block with a latent for each value: 1 at its token, before the ReLU -2 at others.

    It reads one position, and knows of no distractors, which read several.
    """
    d = model.cfg.d_model
    coder = SparseCoder(mambacoder_config(0, d, VALUES, architecture="standard"), seed=0).double()
    tokens = torch.arange(QUERY + 1)[:, None].expand(-1, K)  # said K times, so that the convolution sees it alone
    with torch.no_grad():
        _, cache = model.run_with_cache(tokens)
        n, out = cache["blocks.0.norm.hook_out"][:, -1], cache["blocks.0.mixer.hook_out_proj"][:VALUES, -1]
        at_own = torch.eye(QUERY + 1, VALUES, dtype=n.dtype)
        coder.W_enc.copy_(torch.linalg.lstsq(n, 3 * at_own).solution)
        coder.b_enc.fill_(-2)
        coder.W_dec.copy_(out)
        coder.b_dec.zero_()
    return coder


INDUCTION_TOKENS = 6


def induction_cases(n: int, seed: int) -> list[Case]:
    """Each token occurs once, in random order; then one of them again, not the last."""
    generator = torch.Generator().manual_seed(seed)
    cases = []
    for _ in range(n):
        tokens = torch.randperm(INDUCTION_TOKENS, generator=generator)
        i = int(torch.randint(0, INDUCTION_TOKENS - 1, (1,), generator=generator))
        prompt = torch.cat([tokens, tokens[i : i + 1]])
        answer, other = int(tokens[i + 1]), int(tokens[i])
        cases.append(Case(prompt[None], answer, other, i + 1, i + 1, [i, len(tokens)]))
    return cases


def induction(family: str, seed: int, distractors: bool = False, turned: bool = False) -> Compiled:
    """Two layers in either family. Stream: the token, its predecessor, what the logits read, a constant, noise."""
    n = INDUCTION_TOKENS
    common: dict[str, Any] = {
        "d_model": 3 * n + 1 + NOISE, "n_layers": 2, "d_vocab": n, "d_conv": K, "tie_embeddings": False, "d_state": n,
    }  # fmt: skip
    model: Any
    if family == "mamba":
        model = HookedMamba(MambaConfig(**common, d_inner=3 * n, dt_rank=1), seed=0)
    else:
        model = HookedMamba2(Mamba2Config(**common, d_inner=2 * n, head_dim=n, n_groups=2, norm_groups=1), seed=0)
    model = model.double()
    generator = torch.Generator().manual_seed(seed)
    read, one = slice(2 * n, 3 * n), 3 * n
    with torch.no_grad():
        _zero(model)
        eye = torch.eye(n, dtype=torch.float64)
        noise = torch.randn(n, NOISE, generator=generator, dtype=torch.float64)
        model.embed.weight[:, :n] = (0.8 if distractors else 1) * eye
        model.embed.weight[:, one] = 1
        if distractors:
            model.embed.weight[:, one + 1 :] = 0.6 * noise / noise.norm(dim=1, keepdim=True)
        model.unembed.weight[:, read] = 5 * eye
        first, second = (block.mixer for block in model.blocks)
        (_induction_mamba if family == "mamba" else _induction_mamba2)(first, second, generator, distractors)
        channels = torch.arange(model.cfg.E)
        if turned:
            rotate(model, generator)
            permute(first, generator)
            channels = permute(second, generator)
    return Compiled(model, channels.argsort()[:n].tolist())


def _induction_mamba(first: Any, second: Any, generator: torch.Generator, distractors: bool) -> None:
    """Channels: values, keys, distractors."""
    n = INDUCTION_TOKENS
    token, before, read, one = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n), 3 * n
    eye = torch.eye(n, dtype=torch.float64)
    first.in_proj.weight[:n, token] = eye
    first.conv1d.weight[:n, 0, K - 2] = 1  # the token before
    first.D[:n] = 1
    first.out_proj.weight[before, :n] = 0.1 * eye
    second.in_proj.weight[:n, token] = eye
    second.in_proj.weight[n : 2 * n, before] = eye
    second.conv1d.weight[:, 0, K - 1] = 1
    second.x_proj.weight[1 : 1 + n, n : 2 * n] = eye  # B: stored under its predecessor
    second.x_proj.weight[1 + n :, :n] = eye  # C: asked for by the token itself
    second.dt_proj.bias.fill_(1)
    second.A_log.fill_(-7)
    second.out_proj.weight[read, :n] = 3 * eye
    for mixer in (first, second):
        mixer.in_proj.weight[3 * n :, one] = 1
        if distractors:
            _distract(mixer, mixer.in_proj.weight[: 3 * n], slice(2 * n, 3 * n), 0.02, generator)
            mixer.D[2 * n :] = 1


def _induction_mamba2(first: Any, second: Any, generator: torch.Generator, distractors: bool) -> None:
    """Two heads with groups of their own: values, distractors. B and C come through the convolution and SiLU, which
    leaves zeros zero, so that a key matches itself alone; what a layer writes has one size, by the norm behind its
    gate."""
    n, E, H = INDUCTION_TOKENS, 2 * INDUCTION_TOKENS, 2
    token, before, read, one = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n), 3 * n
    eye = torch.eye(n, dtype=torch.float64)
    for mixer in (first, second):
        z, x, B, C, _ = mixer.in_proj.weight.split([E, E, 2 * n, 2 * n, H])
        x_taps, B_taps, C_taps = mixer.conv1d.weight[:, 0].split([E, 2 * n, 2 * n])
        z[:, one] = 1
        x[:n, token] = eye
        B[n:, one] = C[n:, one] = 1  # the distractors read all that came before
        B_taps[:, K - 1] = C_taps[:, K - 1] = 1
        mixer.A_log.fill_(-7)
        if mixer is first:
            x_taps[:n, K - 2] = 1  # the token before
            mixer.D[0] = 1
            mixer.dt_bias[0] = -20
            mixer.out_proj.weight[before, :n] = 0.3 * eye
        else:
            x_taps[:n, K - 1] = 1
            B[:n, before] = eye  # stored under its predecessor
            C[:n, token] = eye  # asked for by the token itself
            mixer.dt_bias[0] = 1
            mixer.out_proj.weight[read, :n] = eye
        mixer.dt_bias[1] = -8
        if distractors:
            _distract(mixer, x, slice(n, 2 * n), 0.05, generator)
            mixer.D[1] = 1


def _distract(mixer: Any, x: Tensor, noisy: slice, size: float, generator: torch.Generator) -> None:
    """Channels that read tokens' noise through taps of their own and write into what the logits read."""
    n, dtype = INDUCTION_TOKENS, x.dtype
    x[noisy, 3 * n + 1 :] = torch.randn(n, NOISE, generator=generator, dtype=dtype)
    mixer.conv1d.weight[noisy, 0] = torch.randn(n, K, generator=generator, dtype=dtype)
    mixer.out_proj.weight[2 * n : 3 * n, noisy] = size * torch.randn(n, n, generator=generator, dtype=dtype)
