"""A mixture of experts (Shazeer et al. 2017, arXiv:1701.06538), with every step of the routing editable.

    logits = W_r x                        one number per expert
    scores = softmax(logits), logits, or sigmoid(logits) + bias           what top-k ranks
    indices = the k best scores           weights = theirs, by the scoring's own rule
    out = sum_k weights_k expert_{indices_k}(x)

Experts are gated or ungated MLPs, in the width of the stream or in a latent one between two projections. If a hook
changes the indices, the weights and the experts' work follow.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from hooked_mamba.components import Linear, at_least_fp32, linear
from hooked_mamba.frozen.chain import Chain
from hooked_mamba.frozen.linear import Gain, Piece
from hooked_mamba.frozen.routed import IntoExperts, OutOfExperts, Routing
from hooked_mamba.frozen.tokens import TokenPath
from hooked_mamba.hooks.points import HookPoint
from hooked_mamba.hooks.site import Site
from hooked_mamba.hybrid_config import MoEConfig
from hooked_mamba.layers import weights_of
from hooked_mamba.mixers.base import Branch
from hooked_mamba.mixers.linear_form import Read, projection
from hooked_mamba.mixers.mlp import ACTIVATIONS, activation_path
from hooked_mamba.mixers.precision import uniform_fan_in
from hooked_mamba.state import BranchState, Call, columns_read


class MoE(Branch):
    """x -> router -> k experts -> weighted sum, with a hook point at every site."""

    kind = "moe"
    packs = True
    title = "MoE"
    place = "moe"
    config_class = MoEConfig
    sites = (
        Site("hook_router_logits", "b l X", "the router's output, one number per expert", wide=True),
        Site("hook_router_scores", "b l X", "what the choice of experts ranks", wide=True),
        Site("hook_expert_indices", "b l k", "the chosen experts, best first", integer=True),
        Site("hook_expert_weights", "b l k", "factor of each chosen expert's output", wide=True),
        Site("hook_latent", "b l r", "what the experts read, where they work in a latent width"),
        Site("hook_expert_pre", "b l k F", "neurons of each chosen expert before the activation", kind="lazy"),
        Site("hook_expert_pre_linear", "b l k F", "the other factor of a gated expert", kind="lazy"),
        Site("hook_expert_post", "b l k F", "neurons after the activation, times the other factor", kind="lazy"),
        Site("hook_expert_out", "b l k r", "output of each chosen expert, before its weight", kind="lazy"),
        Site("hook_out", "b l d", "output of the layer"),
    )

    def __init__(self, cfg: MoEConfig, layer: int = 0) -> None:
        super().__init__()
        self.cfg = cfg
        X, F, d, r = cfg.n_experts, cfg.d_mlp, cfg.d_model, cfg.d_expert
        self.router = Linear(d, X, bias=False)
        if cfg.correction_bias:
            self.correction_bias = nn.Parameter(torch.empty(X))
        if cfg.d_latent is not None:
            self.latent_in = Linear(d, r, bias=False)
            self.latent_out = Linear(r, d, bias=False)
        if cfg.gated:
            self.gate_proj = nn.Parameter(torch.empty(X, F, r))
        self.up_proj = nn.Parameter(torch.empty(X, F, r))
        self.down_proj = nn.Parameter(torch.empty(X, r, F))
        self.keep_float32 = ("correction_bias",) if cfg.correction_bias else ()
        self.add_sites()

    def site_rows(self) -> tuple[Site, ...]:
        absent = {"hook_latent"} if self.cfg.d_latent is None else set()
        absent |= set() if self.cfg.gated else {"hook_expert_pre_linear"}
        return tuple(row for row in type(self).sites if row.name not in absent)

    def sizes(self) -> dict[str, int]:
        cfg = self.cfg
        return {"X": cfg.n_experts, "k": cfg.top_k, "F": cfg.d_mlp, "r": cfg.d_expert, "d": cfg.d_model}

    def facts(self) -> tuple[tuple[str, object], ...]:
        return ("experts X, chosen k", f"{self.cfg.n_experts}, {self.cfg.top_k}"), (
            "neurons of an expert",
            self.cfg.d_mlp,
        )

    def forward(
        self, resid: Float[Tensor, "b l d"], state: BranchState | None = None, call: Call | None = None
    ) -> tuple[Float[Tensor, "b m d"], BranchState]:
        resid = columns_read(resid, call)
        router, _ = weights_of(self.router, "router")
        logits = self.hook_router_logits(linear(at_least_fp32(resid), at_least_fp32(router)))
        scores = self.hook_router_scores(self.scores(logits))
        indices = self.hook_expert_indices(self.choose(scores))
        weights = self.hook_expert_weights(self.weigh(logits, scores, indices))
        x = resid if self.cfg.d_latent is None else self.hook_latent(self.latent_in(resid))
        out = (self.experts(x, indices) * weights.to(x.dtype).unsqueeze(-1)).sum(2)
        return self.hook_out(out if self.cfg.d_latent is None else self.latent_out(out)), ()

    # Routing -------------------------------------------------------------------------------------------------

    def scores(self, logits: Float[Tensor, "b l X"]) -> Float[Tensor, "b l X"]:
        """What the choice ranks."""
        if self.cfg.scoring == "softmax":
            return logits.softmax(-1)
        scores = logits.sigmoid() if self.cfg.scoring == "sigmoid" else logits
        return scores + self.correction_bias if self.cfg.correction_bias else scores

    def choose(self, scores: Float[Tensor, "b l X"]) -> Int[Tensor, "b l k"]:
        """The best experts, the best first, of equal ones the first; only those of the best groups take part."""
        cfg = self.cfg
        if cfg.n_groups > 1:  # a group is as good as its best two experts together
            groups = scores.unflatten(-1, (cfg.n_groups, -1))
            best = groups.topk(min(2, groups.shape[-1]), -1).values.sum(-1)
            kept = torch.zeros_like(best, dtype=torch.bool).scatter(-1, best.topk(cfg.top_k_groups, -1).indices, True)
            scores = groups.masked_fill(~kept.unsqueeze(-1), -torch.inf).flatten(-2)
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., : cfg.top_k]

    def weigh(
        self, logits: Float[Tensor, "b l X"], scores: Float[Tensor, "b l X"], indices: Int[Tensor, "b l k"]
    ) -> Float[Tensor, "b l k"]:
        """The weights of chosen experts; a correction bias affects only the choice."""
        cfg = self.cfg
        plain = logits.sigmoid() if cfg.scoring == "sigmoid" and cfg.correction_bias else scores
        weights = plain.gather(-1, indices)
        if cfg.scoring == "top_k_softmax":
            weights = weights.softmax(-1)
        if cfg.normalize:
            weights = weights.div(weights.sum(-1, keepdim=True) + 1e-20)
        return weights if cfg.routed_scale == 1 else weights * cfg.routed_scale

    # Experts -------------------------------------------------------------------------------------------------

    def experts(self, x: Float[Tensor, "b l r"], indices: Int[Tensor, "b l k"]) -> Float[Tensor, "b l k r"]:
        """The output of each chosen expert for its token.

        1. Sort the pairs (token, choice) by expert, so that each expert's tokens are one slice.
        2. One matrix product per expert in use and layer of it, in this order.
        3. Back into the order of tokens, also at any site in between that is in use.
        """
        batch, length, k = indices.shape
        flat = indices.reshape(-1)
        one_token = batch * length == 1
        order = torch.arange(k, device=x.device) if one_token else flat.argsort(stable=True)
        back = order if one_token else order.argsort()
        if one_token:  # a step of generation: one row per expert, in the order of the choices
            hit, counts = flat.tolist(), [1] * k
        else:
            found = torch.bincount(flat, minlength=self.cfg.n_experts).tolist()
            hit, counts = [e for e, n in enumerate(found) if n], [n for n in found if n]

        def grouped(values: Tensor, W: Float[Tensor, "X o i"]) -> Tensor:
            return torch.cat([linear(v[None], W[e])[0] for e, v in zip(hit, values.split(counts), strict=True)])

        def through(hook: HookPoint, values: Tensor) -> Tensor:
            if not hook.wanted:
                return values
            return hook(values[back].unflatten(0, (batch, length, k))).flatten(0, 2)[order]

        xs = x.reshape(batch * length, -1)[order // k]
        act = ACTIVATIONS[self.cfg.activation]
        if self.cfg.gated:
            post = act(through(self.hook_expert_pre, grouped(xs, self.gate_proj)))
            post = post * through(self.hook_expert_pre_linear, grouped(xs, self.up_proj))
        else:
            post = act(through(self.hook_expert_pre, grouped(xs, self.up_proj)))
        out = grouped(through(self.hook_expert_post, post), self.down_proj)[back].unflatten(0, (batch, length, k))
        return self.hook_expert_out(out) if self.hook_expert_out.wanted else out

    # The linear form: the routing is held, and each expert's activation as a factor ------------------------------

    @property
    def frozen_sites(self) -> tuple[str, ...]:  # type: ignore[override]
        linear = ("hook_expert_pre_linear",) * self.cfg.gated
        return ("hook_expert_indices", "hook_expert_weights", "hook_expert_pre", *linear, "hook_expert_post")

    @property
    def places(self) -> dict[str, str]:  # type: ignore[override]
        return {"p": "hook_expert_pre_linear" if self.cfg.gated else "hook_expert_pre", "u": "hook_expert_post"}

    def frozen(self, read: Read, before: BranchState | None, mask: Bool[Tensor, "b l"] | None, norm: Gain) -> Chain:
        """As in :class:`LinearForm`; its channels are the neurons of the chosen experts, k F of them side by side."""
        path, chosen = self.token_path(read), read("hook_expert_indices")
        weights = at_least_fp32(read("hook_expert_weights")).repeat_interleave(self.cfg.d_mlp, -1)
        latent = self.cfg.d_latent is not None
        pieces: list[Piece] = [norm]
        pieces += [projection(self.latent_in, where="latent_in")] if latent else []
        pieces += [IntoExperts(at_least_fp32(self.up_proj.detach()), chosen)]
        pieces += [] if mask is None else [Gain(mask.unsqueeze(-1).to(path.p.dtype))]
        nodes = {"p": len(pieces), "u": len(pieces) + 1, "y": len(pieces) + 1}
        pieces += [Gain(path.sigma), Gain(weights), OutOfExperts(at_least_fp32(self.down_proj.detach()), chosen)]
        pieces += [projection(self.latent_out, where="latent_out")] if latent else []
        u = at_least_fp32(read("hook_expert_post").flatten(2))
        return Chain(
            tuple(pieces),
            nodes,
            path,
            {"p": path.p, "u": u},
            routing=Routing(chosen, self.cfg.n_experts),
            unit=self.cfg.d_mlp,
        )

    def token_path(self, read: Read) -> TokenPath:
        pre = at_least_fp32(read("hook_expert_pre")).flatten(2)
        linear = at_least_fp32(read("hook_expert_pre_linear")).flatten(2) if self.cfg.gated else None
        return activation_path(ACTIVATIONS[self.cfg.activation], pre, linear)

    def bias_sites(self) -> list[tuple[str, Tensor | None]]:
        return []

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Random weights: Kaiming-uniform, the output scaled down by the root of the number of blocks."""
        for name, weight in self.named_parameters():
            if name == "correction_bias":
                weight.zero_()
            else:
                uniform_fan_in(weight, weight.shape[-1], generator)
        self.down_proj.div_(self.cfg.n_layers**0.5)
