"""Causal attention with grouped queries (Vaswani et al. 2017, arXiv:1706.03762; Ainslie et al. 2023, arXiv:2305.13245).

Glossary
    b, l  batch, positions of this call     m  keys: those before this call, then its own
    Q  query heads      J  heads of keys and values, each for Q / J query heads      c  width of a head
    scores = scale q k^T    pattern = softmax(scores)    z = pattern v    out = W_O z
"""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_mamba.components import Linear, LowRank, at_least_fp32, rms_normalize
from hooked_mamba.documents import Documents
from hooked_mamba.frozen.linear import Project
from hooked_mamba.frozen.pattern import Pattern
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.site import Site
from hooked_mamba.hybrid_config import AttentionConfig
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.kv_state import KVState, remember
from hooked_mamba.mixers.linear_form import Read, low_rank, projection
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.mixers.rope import rotate, turn_of
from hooked_mamba.mixers.weight_views import AttentionViews
from hooked_mamba.state import BranchState, Call


class Attention(AttentionViews, Branch):
    """q, k, v -> positions -> scores -> pattern -> z -> output, with a hook point at every site."""

    kind = "attention"
    packs = True
    title = "Attention"
    place = "attn"
    config_class = AttentionConfig
    growing = ("k", "v", "real")
    sites = (
        Site("hook_q_pre", "b l Q c", "queries before their norm, where they have one"),
        Site("hook_k_pre", "b l J c", "keys before their norm, where they have one"),
        Site("hook_q", "b l Q c", "queries, before positions"),
        Site("hook_k", "b l J c", "keys, before positions"),
        Site("hook_v", "b l J c", "values"),
        Site("hook_rot_q", "b l Q c", "queries turned by their positions, where the model has them"),
        Site("hook_rot_k", "b l J c", "keys turned by their positions, where the model has them"),
        Site("hook_attn_scores", "b Q l m", "scaled scores, -inf where a query must not look", kind="lazy", wide=True),
        Site("hook_pattern", "b Q l m", "softmax of the scores over the keys", kind="lazy", default=True),
        Site("hook_z", "b l Q c", "values mixed by the pattern"),
        Site("hook_gate", "b l Q c", "gate of the mixed values, after its sigmoid, where there is one"),
        Site("hook_z_gated", "b l Q c", "z * gate, where there is one"),
        Site("hook_result", "b l Q d", "what each head adds to the output, biases left out", kind="lazy"),
        Site("hook_out", "b l d", "output of the layer"),
    )

    def __init__(self, cfg: AttentionConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        Q, J, c, d = cfg.n_heads, cfg.n_key_value_heads, cfg.d_head, cfg.width_in
        self.q_proj = Linear(d, Q * c, bias=cfg.qkv_bias)
        self.k_proj = Linear(d, J * c, bias=cfg.qkv_bias)
        self.v_proj = Linear(d, J * c, bias=cfg.qkv_bias)
        self.o_proj = Linear(Q * c, cfg.width_out, bias=cfg.out_bias)
        if cfg.output_gate:
            self.gate_proj = Linear(d, Q * c, bias=cfg.qkv_bias)
            self.frozen_sites = (*type(self).frozen_sites, "hook_gate")
        if cfg.qk_norm_eps is not None:
            self.q_norm_weight = nn.Parameter(torch.ones(Q * c if cfg.qk_norm_of_all else c))
            self.k_norm_weight = nn.Parameter(torch.ones(J * c if cfg.qk_norm_of_all else c))
        if cfg.adapter_rank is not None:
            self.adapters = nn.ModuleDict(
                {name: LowRank(d, cfg.adapter_rank, heads * c) for name, heads in (("q", Q), ("k", J), ("v", J))}
            )
        self.add_sites()

    def site_rows(self) -> tuple[Site, ...]:
        absent: tuple[str, ...] = () if self.cfg.rotary_dim else ("hook_rot_q", "hook_rot_k")
        absent += ("hook_q_pre", "hook_k_pre") if self.cfg.qk_norm_eps is None else ()
        absent += () if self.cfg.output_gate else ("hook_gate", "hook_z_gated")
        return tuple(row for row in type(self).sites if row.name not in absent)

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        return {"Q": cfg.n_heads, "J": cfg.n_key_value_heads, "c": cfg.d_head, "d": cfg.width_out}

    def facts(self) -> tuple[tuple[str, object], ...]:
        cfg = self.cfg
        return ("attention heads Q × c", f"{cfg.n_heads} × {cfg.d_head}"), ("key-value heads J", cfg.n_key_value_heads)

    def forward(
        self, resid: Float[Tensor, "b l i"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b l d"], KVState]:
        cfg, call = self.cfg, Call() if call is None else call
        batch, length, _ = resid.shape
        q, k, v = (self.projected(name, resid) for name in ("q", "k", "v"))
        if cfg.qk_norm_eps is not None:
            q = self.normed(self.hook_q_pre(q), self.q_norm_weight, cfg.qk_norm_eps)
            k = self.normed(self.hook_k_pre(k), self.k_norm_weight, cfg.qk_norm_eps)
        q = self.hook_q(q)
        k = self.hook_k(k if cfg.key_multiplier == 1 else k * cfg.key_multiplier)
        v = self.hook_v(v)
        if cfg.rotary_dim:
            turn = turn_of(call, q, cfg.rotary_dim, cfg.rotary_base)
            q, k = self.hook_rot_q(rotate(q, turn)), self.hook_rot_k(rotate(k, turn))
        new = KVState(k, v, call.real_columns(batch, length, resid.device))
        new.whole = call.padding is None
        memory = remember(state, new)
        z = self.hook_z(self.mix(q, memory, call))
        if call.documents is not None:  # later calls continue the last document
            memory = KVState(memory.k, memory.v, memory.real & of_last(call.documents, memory.real.shape[1]))
        if cfg.output_gate:
            z = self.hook_z_gated(z * self.hook_gate(torch.sigmoid(self.projected("gate", resid))))
        if self.hook_result.edited:
            out = self.hook_result(self.of_heads(z)).sum(2)
            out = out if self.o_proj.bias is None else out + self.o_proj.bias
        else:
            out = self.o_proj(z.flatten(2))
            self.hook_result.read(length, lambda t: self.of_heads(z[:, t]))
        return self.hook_out(out), memory

    def normed(self, x: Float[Tensor, "b l h c"], weight: Tensor, eps: float) -> Float[Tensor, "b l h c"]:
        """Queries or keys with an RMS norm of each head, or of all heads together."""
        if not self.cfg.qk_norm_of_all:
            return rms_normalize(x, eps) * weight
        return (rms_normalize(x.flatten(2), eps) * weight).reshape(x.shape)

    def projected(self, name: str, resid: Float[Tensor, "b l i"]) -> Float[Tensor, "b l h c"]:
        """Queries, keys, values or gates as projected, split into heads."""
        out = self.get_submodule(f"{name}_proj")(resid)
        if self.cfg.adapter_rank is not None and name in self.adapters:
            out = out + self.adapters[name](resid)
        return out.unflatten(-1, (-1, self.cfg.d_head))

    def mix(self, q: Float[Tensor, "b l Q c"], memory: KVState, call: Call) -> Float[Tensor, "b l Q c"]:
        """z = softmax(scale q k^T) v; scores and pattern are computed only if they are in use."""
        length, m = q.shape[1], memory.k.shape[1]
        documents = call.documents
        seen = None if documents is None and memory.all_real() else visible(memory.real, length, documents)
        if self.hook_attn_scores.edited or self.hook_pattern.edited:
            everything = slice(None)
            scores = self.hook_attn_scores(self.scores(q, memory, everything, call))
            pattern = self.hook_pattern(scores.softmax(-1).to(q.dtype))
            z = torch.einsum("bhqm,bmhc->bqhc", pattern, of_queries(memory.v, self.cfg.n_heads))
        else:
            self.hook_attn_scores.read(length, lambda t: self.scores(q, memory, t, call))
            self.hook_pattern.read(length, lambda t: self.scores(q, memory, t, call).softmax(-1).to(q.dtype))
            mask = seen if seen is not None else visible(memory.real, length) if 1 < length < m else None
            # At one position the heads that share keys are rows of one product.
            rows = q.transpose(1, 2) if length > 1 else q.unflatten(2, (memory.k.shape[2], -1))[:, 0]
            z = F.scaled_dot_product_attention(
                rows,
                memory.k.transpose(1, 2),
                memory.v.transpose(1, 2),
                attn_mask=None if mask is None else mask[:, None],
                is_causal=mask is None and length > 1,
                scale=self.cfg.score_scale,
                enable_gqa=length > 1,
            )
            z = z.transpose(1, 2) if length > 1 else z.flatten(1, 2).unsqueeze(1)
        return z if call.padding is None else call.padding.zero(z)

    def scores(
        self, q: Float[Tensor, "b l Q c"], memory: KVState, t: list[int] | slice, call: Call
    ) -> Float[Tensor, "b Q q m"]:
        """Scaled scores of chosen queries, -inf where they must not look."""
        keys = of_queries(memory.k, self.cfg.n_heads)
        scores = at_least_fp32(torch.einsum("bqhc,bmhc->bhqm", q[:, t], keys))
        scores.mul_(self.cfg.score_scale)  # in place: these are the largest tensors of a pass
        if (
            t == slice(None) and call.documents is None and memory.all_real()
        ):  # zeros above the diagonal, then -inf there: faster than by a mask
            before = scores.shape[-1] - scores.shape[-2]
            return scores.tril_(before).add_(later_keys(scores, before, call))
        return scores.masked_fill_(~visible(memory.real, q.shape[1], call.documents)[:, None, t], -torch.inf)

    def of_heads(self, z: Float[Tensor, "b q Q c"]) -> Float[Tensor, "b q Q d"]:
        """What each head adds to the output."""
        W_O = rearrange(weights_of(self.o_proj, "o_proj")[0], "d (h c) -> h c d", c=self.cfg.d_head)
        return torch.einsum("bqhc,hcd->bqhd", z, W_O)

    def initial_state(self, batch: int, device: torch.device | str | None = None) -> KVState:
        """No column at all."""
        weight, cfg = self.k_proj.weight, self.cfg
        empty = weight.new_zeros(batch, 0, cfg.n_key_value_heads, cfg.d_head, device=device)
        return KVState(empty, empty, torch.zeros(batch, 0, dtype=torch.bool, device=empty.device))

    # The linear form: the pattern is held ------------------------------------------------------------------------

    frozen_sites: tuple[str, ...] = ("hook_v", "hook_pattern")
    places: ClassVar = {"u": "hook_v", "y": "hook_z"}

    @property
    def head_width(self) -> int:  # type: ignore[override]
        return self.cfg.d_head

    @property
    def unit(self) -> int:  # type: ignore[override]
        return self.cfg.d_head

    def held_scan(self, read: Read) -> Pattern:
        v = of_queries(read("hook_v"), self.cfg.n_heads)
        return Pattern(v, read("hook_pattern").to(v.dtype))

    def token_path(self, read: Read) -> TokenPath:
        return TokenPath.straight(of_queries(read("hook_v"), self.cfg.n_heads))

    def output_gain(self, read: Read) -> Float[Tensor, "b l E"] | None:
        return at_least_fp32(read("hook_gate")).flatten(2) if self.cfg.output_gate else None

    def value_input(self) -> Project:
        """v's weights, those of a key-value head repeated for each of its query heads."""
        own, c, Q = projection(self.v_proj, where="v_proj"), self.cfg.d_head, self.cfg.n_heads
        if self.cfg.adapter_rank is not None:
            own = Project(own.W + low_rank(self.adapters["v"], "adapters.v"), own.b)
        W = of_queries(own.W.reshape(1, 1, -1, c * own.W.shape[1]), Q).reshape(Q * c, -1)
        return Project(W, None if own.b is None else of_queries(own.b.reshape(1, 1, -1, c), Q).flatten())

    def value_output(self) -> Project:
        return projection(self.o_proj, where="o_proj")

    def memory(self, before: BranchState | None) -> Tensor | None:
        """Values before the first position."""
        return of_queries(before[1], self.cfg.n_heads) if before and before[1].shape[1] else None

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: Kaiming-uniform, the output scaled down by the root of the number of blocks."""
        for linear in (module for module in self.modules() if isinstance(module, Linear)):
            uniform_fan_in(linear.weight, linear.in_features, generator)
            if linear.bias is not None:
                linear.bias.zero_()
        if self.cfg.qk_norm_eps is not None:
            self.q_norm_weight.fill_(1)
            self.k_norm_weight.fill_(1)
        self.o_proj.weight /= self.cfg.n_layers**0.5


def visible(real: Bool[Tensor, "b m"], length: int, documents: Documents | None = None) -> Bool[Tensor, "b l m"]:
    """Which keys each of the last `length` columns sees: real ones of its document up to itself. A padded query sees
    only itself. Columns before this call belong to a row's first document."""
    m = real.shape[1]
    columns = torch.arange(m, device=real.device)
    own = columns[m - length :, None]
    causal = (columns <= own) & real[:, None]
    if documents is not None:
        number = numbers(documents, m)
        causal = causal & (number[:, m - length :, None] == number[:, None])
    return torch.where(real[:, m - length :, None], causal, (columns == own)[None])


def numbers(documents: Documents, m: int) -> Int[Tensor, "b m"]:
    """The document of each of m columns, of which the last ones are those of this call."""
    number = documents.number
    return torch.cat([number.new_zeros(len(number), m - number.shape[1]), number], 1)


def of_last(documents: Documents, m: int) -> Bool[Tensor, "b m"]:
    """Columns of each row's last document."""
    number = numbers(documents, m)
    return number == number[:, -1:]


def later_keys(scores: Float[Tensor, "b Q l m"], before: int, call: Call) -> Float[Tensor, "l m"]:
    """-inf at keys after each query, else 0; one for all layers of a pass."""
    key = (*scores.shape[2:], scores.dtype, scores.device)
    if key not in call.hidden:
        call.hidden[key] = torch.full_like(scores[0, 0], -torch.inf).triu_(before + 1)
    return call.hidden[key]


def of_queries(kv: Float[Tensor, "b m J c"], heads: int) -> Float[Tensor, "b m Q c"]:
    """Keys or values of every query head."""
    return kv.repeat_interleave(heads // kv.shape[2], 2)
