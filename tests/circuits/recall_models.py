"""A hybrid written by hand that needs its attention and its state: the key is found by one, the value carried by the
other.

... value . . key . . value . . key . . query -> the value that stood last before the query's key

Block 0 is a Mamba mixer that holds the last value seen; block 1 is attention, in which the query looks at its key and
copies what the state had brought there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_mamba.config import MambaConfig
from hooked_mamba.hybrid_config import AttentionConfig, HybridConfig
from hooked_mamba.model.hybrid import HookedHybrid
from saes import SparseCoder, sae_config

VALUES, KEYS, FILLERS, NOISE = 5, 4, 4, 6
FIRST_KEY, FIRST_FILLER, FIRST_QUERY = VALUES, VALUES + KEYS, VALUES + KEYS + FILLERS
# The residual stream: values, keys, queries, a constant, noise, what the state carries, what the logits read.
KEY, QUERY, ONE = VALUES, VALUES + KEYS, VALUES + 2 * KEYS
NOISE_AT = ONE + 1
CARRIED = NOISE_AT + NOISE
OUT = CARRIED + VALUES
WIDTH = OUT + VALUES


@dataclass(frozen=True)
class Recall:
    """A prompt and its circuit."""

    tokens: Tensor
    answer: int
    other: int
    value_at: int
    key_at: int


def cases(n: int, seed: int) -> list[Recall]:
    """Prompts of 16 tokens with two keys, each behind a value of its own, and other values that no key follows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(below: int, count: int) -> list[int]:
        return torch.randperm(below, generator=generator)[:count].tolist()

    found = []
    for _ in range(n):
        tokens = torch.randint(FIRST_FILLER, FIRST_QUERY, (16,), generator=generator)
        values, keys = draw(VALUES, 3), draw(KEYS, 2)
        places = []
        for start, value, key in ((1, values[0], keys[0]), (8, values[1], keys[1])):
            at = start + draw(3, 1)[0]
            behind = at + 1 + draw(3, 1)[0]
            tokens[at], tokens[behind] = value, FIRST_KEY + key
            places.append((at, behind))
        tokens[0] = values[2]
        asked = draw(2, 1)[0]
        tokens[-1] = FIRST_QUERY + keys[asked]
        found.append(Recall(tokens[None], values[asked], values[1 - asked], *places[asked]))
    return found


@torch.no_grad()
def recall(seed: int) -> HookedHybrid:
    """The model, with channels and a head that do other things, in a turned basis of the stream."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    stack = {"d_model": WIDTH, "n_layers": 2}
    mixer_cfg = MambaConfig(**stack, d_vocab=FIRST_QUERY + KEYS, d_state=2, d_conv=2, d_inner=2 * VALUES + 2, dt_rank=1)
    attention = AttentionConfig(**stack, n_heads=2, n_key_value_heads=1, d_head=2 * VALUES, scale=1.0)
    cfg = HybridConfig(
        **stack, d_vocab=FIRST_QUERY + KEYS, tie_embeddings=False, branches={"mixer": mixer_cfg, "attn": attention},
        layout=((("mixer",),), (("attn",),)),
    )  # fmt: skip
    model = HookedHybrid(cfg, seed=0).double()
    for name, parameter in model.named_parameters():
        if "norm" not in name and "ln_final" not in name:
            parameter.zero_()
    embed, eye = model.embed.weight, torch.eye(VALUES, dtype=torch.float64)
    embed[:, ONE] = 1
    embed[:VALUES, :VALUES] = eye
    embed[FIRST_KEY:FIRST_FILLER, KEY:QUERY] = torch.eye(KEYS, dtype=embed.dtype)
    embed[FIRST_FILLER:FIRST_QUERY, NOISE_AT:CARRIED] = noise(FILLERS, NOISE) / NOISE**0.5
    embed[FIRST_QUERY:, QUERY:ONE] = torch.eye(KEYS, dtype=embed.dtype)
    model.unembed.weight[:VALUES, OUT:] = 5 * eye
    _state(model.blocks[0].mixer, noise)
    attn = model.blocks[1].attn
    attn.q_proj.weight[:KEYS, QUERY:ONE] = attn.k_proj.weight[:KEYS, KEY:QUERY] = 4 * torch.eye(KEYS, dtype=embed.dtype)
    attn.q_proj.weight[2 * VALUES + VALUES :, NOISE_AT:CARRIED] = noise(VALUES, NOISE)  # the second head
    attn.k_proj.weight[VALUES:, NOISE_AT:CARRIED] = noise(VALUES, NOISE)
    attn.v_proj.weight[:VALUES, CARRIED:OUT] = eye
    attn.v_proj.weight[VALUES:, NOISE_AT:CARRIED] = noise(VALUES, NOISE)
    attn.o_proj.weight[OUT:, :VALUES] = 3 * eye
    attn.o_proj.weight[OUT:, 2 * VALUES :] = 0.05 * noise(VALUES, 2 * VALUES)
    Q = torch.linalg.qr(noise(WIDTH, WIDTH))[0]
    for weight in (embed, model.unembed.weight, model.blocks[0].mixer.in_proj.weight):
        weight.copy_(weight @ Q)
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = attn.get_submodule(name).weight
        weight.copy_(weight @ Q)
    for weight in (model.blocks[0].mixer.out_proj.weight, attn.o_proj.weight):
        weight.copy_(Q.t() @ weight)
    return model


def _state(mixer, noise) -> None:
    """Channels: values, others, "a value is here", a constant. dt is about 50 at a value and nothing elsewhere."""
    values, others, seen, one = slice(0, VALUES), slice(VALUES, 2 * VALUES), 2 * VALUES, 2 * VALUES + 1
    E = 2 * VALUES + 2
    W_in = mixer.in_proj.weight
    W_in[values, :VALUES] = torch.eye(VALUES, dtype=W_in.dtype)
    W_in[seen, :VALUES] = W_in[one, ONE] = 1
    W_in[E:, ONE] = 1  # gates are open everywhere
    mixer.conv1d.weight[:, 0, -1] = 1
    mixer.x_proj.weight[0, seen] = 20
    mixer.x_proj.weight[1:3, one] = mixer.x_proj.weight[3:, one] = torch.tensor([0.5, 0.2], dtype=W_in.dtype)
    mixer.dt_proj.weight[values] = 1
    mixer.dt_proj.bias[values] = -20
    mixer.out_proj.weight[CARRIED:OUT, values] = 0.0004 * torch.eye(VALUES, dtype=W_in.dtype)
    W_in[others, NOISE_AT:CARRIED] = noise(VALUES, NOISE)
    mixer.dt_proj.bias[others] = noise(VALUES)
    mixer.D[others] = 1
    mixer.out_proj.weight[OUT:, others] = 0.002 * noise(VALUES, VALUES)


@torch.no_grad()
def dictionaries(model: HookedHybrid) -> list[SparseCoder]:
    """One of what the state takes and one of attention's values, a latent for each value."""
    found = []
    for site in ("blocks.0.mixer.hook_x", "blocks.1.attn.hook_v"):
        d = model.site(site).width
        coder = SparseCoder(sae_config(site, d, VALUES, architecture="standard"), seed=0).double()
        for weight in (coder.W_enc, coder.W_dec):
            weight.zero_()
        coder.W_enc[:VALUES] = torch.eye(VALUES, dtype=torch.float64)
        coder.W_dec[:, :VALUES] = torch.eye(VALUES, dtype=torch.float64)
        found.append(coder)
    return found
