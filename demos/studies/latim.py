"""Token by token: LaTIM's decomposition of a mixer beside the exact one.

LaTIM (Pitorro & Treviso 2025, arXiv:2502.15612) writes a mixer's output as a sum over tokens. What stands in its way
is the SiLU after the convolution, which mixes tokens; it is taken as if it were additive:

    LaTIM   u_{s<-j} = SiLU(kappa_{s-j} p_j)              sums to y only approximately
    ours    u_{s<-j} = sigma_s kappa_{s-j} p_j            sigma_s = sigmoid(xc_s) as it was; sums exactly

and then both go alpha, gate, out_proj. T_t(j), token j's part of the output at t, is scored by its length (l2), or by
how much shorter the output gets without it, in the l1 norm (ALTI; Ferrando et al. 2022).

1. How far the sum of LaTIM's parts is from the mixer's output.
2. Which tokens each names, and how well both go with knocking tokens out, which changes no step size or gate either.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from demos.studies.common import Model, Options, correlation, percent
from demos.studies.facts import Case, known
from demos.studies.report import Report, Section, Table, layer_map
from demos.tour.measure import summarize
from hooked_mamba import ActivationCache
from hooked_mamba import analysis as an


def run(model: Model, options: Options) -> Report:
    """The whole study."""
    report = Report(
        "latim",
        "Token by token: LaTIM's decomposition and the exact one",
        "A mixer's output at the last position as a sum of vectors, one for each token. LaTIM treats SiLU as additive;"
        " here SiLU's factor is held at what it was, and the sum is exact.",
        "After Pitorro & Treviso 2025, arXiv:2502.15612.",
        f"{model.cfg.model_name}: {summarize(model)}.",
    )
    cases = known(model, options.prompts)
    prompts = [case.tokens for case in cases] or [model.to_tokens("Once upon a time, there was a girl named Lily.")]
    caches = [model.run_with_cache(tokens)[1] for tokens in prompts]
    report.sections += [sums_section(model, caches), maps_section(model, caches[0])]
    if cases:
        report.sections.append(knockout_section(model, cases, caches))
    return report


def latim_parts(cache: ActivationCache, layer: int, t: int = -1) -> Float[Tensor, "token d"]:
    """T_t(j) by LaTIM, of a cache of one prompt; biases of the convolution and of out_proj belong to no token."""
    mixer = cache.model.blocks[layer].mixer  # type: ignore[union-attr,index]
    view, path = cache.scan_view(layer), cache.token_path(layer)
    _b, l, H, P = view.u.shape
    t = t % l
    alpha = view.rows([t])[0, :, 0]  # H s
    K = path.taps.shape[1]
    sent = torch.zeros(l, H * P, dtype=path.p.dtype)  # what y_t gets from each token
    for k in range(min(K, l)):
        through = F.silu(path.taps[:, K - 1 - k] * path.p[0, : l - k])  # token j at s = j + k
        sent[: l - k] += alpha[:, k:].t().repeat_interleave(P, 1) * through
    gain = cache.output_gain(layer)[0, t]
    return (sent * gain) @ mixer.out_proj.weight.t().to(sent.dtype)


def exact_parts(
    cache: ActivationCache, layer: int, t: int = -1
) -> tuple[Float[Tensor, "token d"], Float[Tensor, " d"]]:
    """T_t(j) with SiLU's factor held, and what belongs to no token (biases)."""
    parts = cache.stack_source_results(layer, "token", pos_slice=t)
    assert isinstance(parts, Tensor)
    return parts[:-1, 0], parts[-1, 0]


def alti(parts: Float[Tensor, "token d"], whole: Float[Tensor, " d"]) -> Float[Tensor, " token"]:
    """How much shorter the whole gets without each part, l1, nothing below 0, as shares."""
    gone = (whole.norm(p=1) - (whole - parts).norm(p=1, dim=-1)).clamp(min=0)
    return gone / gone.sum().clamp(min=torch.finfo(gone.dtype).tiny)


def both(cache: ActivationCache, layer: int) -> dict[str, Tensor]:
    """Scores of every token for the last position."""
    whole = cache["out_proj", layer][0, -1]
    scores = {}
    for name, parts in (("LaTIM", latim_parts(cache, layer)), ("exact", exact_parts(cache, layer)[0])):
        scores[f"{name}, l2"] = parts.norm(dim=-1)
        scores[f"{name}, ALTI"] = alti(parts.to(whole.dtype), whole)
    return scores


def sums_section(model: Any, caches: list[ActivationCache]) -> Section:
    """How far the parts' sums are from the output, by layer."""
    rows = []
    for i in range(model.cfg.n_layers):
        off: dict[str, list[float]] = {"LaTIM": [], "exact": []}
        same = []
        for cache in caches:
            whole = cache["out_proj", i][0, -1].double()
            exact, constant = exact_parts(cache, i)
            latim = latim_parts(cache, i)
            off["LaTIM"].append(float((latim.double().sum(0) - whole).norm() / whole.norm()))
            off["exact"].append(float((exact.double().sum(0) + constant.double() - whole).norm() / whole.norm()))
            same.append(int(latim.norm(dim=-1).argmax()) == int(exact.norm(dim=-1).argmax()))
        median = {name: float(torch.tensor(found).median()) for name, found in off.items()}
        rows.append([f"layer {i}", percent(median["LaTIM"]), f"{median['exact']:.0e}", f"{sum(same)} of {len(same)}"])
    return Section(
        "Do the parts sum to the output?",
        "Length of the difference between the sum of all parts and the mixer's output at the last position, by the"
        f" output's length; the median over {len(caches)} prompts. The exact sum has one part more, the convolution's"
        " bias, which belongs to no token.",
        Table(["mixer", "LaTIM is off by", "exact", "same largest token (l2)"], rows),
    )


def maps_section(model: Any, cache: ActivationCache) -> Section:
    """Shares of all tokens, layer by layer."""
    words = model.to_str_tokens(cache["tokens"][0])
    every = [both(cache, i) for i in range(model.cfg.n_layers)]
    plots = []
    for name in every[0]:
        values = torch.stack([scores[name] / scores[name].sum() for scores in every])
        plots.append(layer_map(values, words, f"{name}: share of the last position", "{:.1%}", diverging=False))
    return Section("Which tokens", f"“{''.join(words)}”, at its last position.", plots=plots)


def knockout_section(model: Any, cases: list[Case], caches: list[ActivationCache]) -> Section:
    """Correlation with the change of the mixer's output, and of the final answer, when a token is cut from it."""
    agree: dict[str, list[tuple[float, float]]] = {}
    for case, cache in zip(cases, caches, strict=True):
        l = len(case.words)
        mine = torch.eye(l, dtype=torch.bool)
        before = case.difference(model(case.tokens))
        for i in range(model.cfg.n_layers):
            site = f"blocks.{i}.mixer.hook_out_proj"
            with an.knockout(model, mine, -1, i):
                logits, cut = model.run_with_cache(case.tokens.expand(l, -1), names_filter=site)
            moved = (cut[site][:, -1] - cache[site][:, -1]).norm(dim=-1)
            answer = torch.stack([(case.difference(one) - before).abs() for one in logits.split(1)])
            for name, scores in both(cache, i).items():
                agree.setdefault(name, []).append((correlation(scores, moved), correlation(scores, answer)))
    rows = []
    for name, pairs in agree.items():
        middle = torch.tensor(pairs).nanmedian(0).values.tolist()
        rows.append([name, *(f"{value:+.3f}" for value in middle)])
    return Section(
        "Against knocking tokens out",
        f"Every token cut from the last position in one layer, in {len(cases)} prompts: how far the mixer's output"
        " moves, and how much the logit difference of two answers changes. Median correlations of the scores with both,"
        " over prompts and layers. What the cut takes is the exact part itself, up to the gated norm of Mamba-2, so the"
        " first column is a check of it; the second asks whether lengths tell what the answer hears.",
        Table(["score", "with the output's change", "with the answer's change"], rows),
    )
