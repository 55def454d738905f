"""Tiny hybrids in TransformerLens 4's bridges and here: what fires, what the tools on top give, and how long they take.

The bridge changes transformers' model in place, so that each family has a process of its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor

from hooked_mamba import HookedHybrid, patching
from tests.benchmarks import child, hybrid_others, peers
from tests.benchmarks.analysis_contenders import TRANSFORMER_LENS, metric
from tests.benchmarks.hybrid_sites import PARTS, seen
from tests.benchmarks.report import Bound, Section, Table, number, relative_error, timing_table
from tests.benchmarks.sizes import Sizes
from tests.benchmarks.timing import Timing, race, ratio
from tests.hooked_mamba.hybrids.tiny import tokens_for, twin

FAMILIES = ("jamba", "bamba", "granite-moe", "nemotron", "falcon-norm-first", "zamba", "zamba2", "lfm2")
NEW_TOKENS = 20
SWEEP = 5
"""Times faster than the bridge that a sweep is to be."""
NO_BRIDGE = "no bridge"
HERE = "tests.benchmarks.hybrid_peers:"


def run(sizes: Sizes) -> Section:
    """Every family, each in a process of its own."""
    missing = peers.why_missing(TRANSFORMER_LENS)
    length = sizes.sweep[2]
    section = Section(
        "Hybrids beside TransformerLens",
        f"The tiny models of the tests (width 32, 3 to 6 blocks, every weight random), 1 x {length}, the same weights"
        f" in TransformerLens {peers.transformer_lens_version()} on transformers {transformers.__version__}, through"
        " the bridge that it builds, with what it does by default. Distinct tensors are those of a cache that differ in"
        " shape or content, each counted once however many names it has; of ours all sites, also those kept only on"
        " request. Where a tensor stands is decided by the block: what a bridge calls `mixer` counts as attention where"
        f" the block has attention. Wrong tokens: of {NEW_TOKENS} greedy ones, against whole passes in float64.",
        remarks=[missing] if missing else [],
    )
    found = {
        family: child.call(f"{HERE}compare", sizes, fresh=not missing, family=family, bridged=not missing)
        for family in (FAMILIES if sizes.fresh_process else FAMILIES[:2])
    }
    section.tables.append(_sites(found))
    if not missing:
        section.tables.append(_tools(found))
    for family, row in found.items():
        for what, limit in (("run_with_cache", None), ("sweep", SWEEP)):
            if what not in row:
                continue
            timings = {name: Timing(**times) for name, times in row[what].items()}
            errors = {name: number(error) for name, error in row.get(f"{what} error", {}).items()}
            title = f"{family}, " + ("run_with_cache" if limit is None else "patching resid_pre, layer x position")
            extra = {"error": errors} if errors else None
            section.tables.append(timing_table(title, timings, "TransformerLens", extra=extra))
            if sizes.claims and limit is not None:
                gain = ratio(timings["TransformerLens"], timings["ours"])
                section.bounds.append(Bound(f"{family}, sweep, times faster than TransformerLens", gain, limit, True))
    hybrid_others.add(section, sizes)
    return section


def _sites(found: dict[str, dict[str, Any]]) -> Table:
    """Distinct tensors by part of the model, theirs / ours."""
    rows = []
    for family, row in found.items():
        theirs, ours = row.get("seen"), row["seen here"]
        cells = [f"{theirs[part] if theirs else '-'} / {ours[part]}" if ours[part] else "" for part in PARTS]
        names = f"{row['fired']} of {row['names']}" if theirs else NO_BRIDGE
        rows.append([family, names, *cells])
    return Table("Distinct tensors seen, TransformerLens / ours", ["", "its names that fire", *PARTS], rows)


def _tools(found: dict[str, dict[str, Any]]) -> Table:
    """What the tools on top of a cache give."""
    columns = ["decompose_resid", "effective attention", "states", "edit of a pattern", "edit of the routing"]
    columns += ["logits with eager_scan", "effective attention then"]
    rows = [
        [family, *(row.get(name, NO_BRIDGE) for name in (*columns, "wrong tokens"))] for family, row in found.items()
    ]
    return Table("Tools of TransformerLens", ["", *columns, "wrong tokens"], rows)


# One family -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def compare(sizes: Sizes, family: str, bridged: bool = True) -> dict[str, Any]:
    """What one family gives, for JSON."""
    hf = twin(family)
    model = HookedHybrid.from_hf(twin(family)).requires_grad_(False)
    clean, corrupted = (tokens_for(1, sizes.sweep[2], seed) for seed in (0, 1))
    kinds = [list(model.block(i).branches) for i in range(model.cfg.n_layers)]
    _, mine = model.run_with_cache(clean, names_filter=lambda name: True)
    facts: dict[str, Any] = {"seen here": seen(mine.cache_dict, kinds)}
    if not bridged:
        return facts
    try:
        bridge = peers.transformer_lens_model(hf)
    except ValueError:
        return facts
    quiet = peers.quietly
    logits, cache = quiet(lambda: bridge.run_with_cache(clean))
    facts |= {"names": len(bridge.hook_dict), "fired": len(cache.cache_dict), "seen": seen(cache.cache_dict, kinds)}
    facts |= _tool_facts(bridge, model, cache, logits, clean, kinds)
    runs: dict[str, Callable[[], Any]] = {
        "TransformerLens": lambda: quiet(lambda: bridge.run_with_cache(clean)),
        "ours": lambda: model.run_with_cache(clean),
        "ours, forward alone": lambda: model(clean),
    }
    facts["run_with_cache"] = {name: vars(t) for name, t in race(_no_grad(runs), sizes).items()}
    theirs, [_, ours] = peers.transformer_lens_patching(), model.run_with_cache(clean)
    sweeps: dict[str, Callable[[], Any]] = {
        "TransformerLens": lambda: quiet(lambda: theirs.get_act_patch_resid_pre(bridge, corrupted, cache, metric)),
        "ours": lambda: patching.get_act_patch_resid_pre(model, corrupted, ours, metric, progress=False),
    }
    exact = _exact_sweep(model, clean, corrupted)
    facts["sweep error"] = {name: relative_error(call(), exact) for name, call in sweeps.items()}
    facts["sweep"] = {name: vars(t) for name, t in race(_no_grad(sweeps), sizes).items()}
    return facts


def _no_grad(calls: dict[str, Callable[[], Any]]) -> dict[str, Callable[[], Any]]:
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def _tool_facts(
    bridge: Any, model: HookedHybrid, cache: Any, logits: Tensor, tokens: Tensor, kinds: list[list[str]]
) -> dict[str, str]:
    """Its own tools, each tried: what it gives, or the error it ends with."""
    n = model.cfg.n_layers
    stream = cache[f"blocks.{n - 1}.hook_resid_post"]
    scans = [i for i, names in enumerate(kinds) if "mixer" in names and model.block(i).branches["mixer"].moves_values]

    def residual() -> str:
        off = float((cache.decompose_resid(n).sum(0) - stream).abs().max())
        return "sums to the stream" if off < 1e-4 * float(stream.abs().max()) else f"off by {off:.1f}, no error"

    def reconstructed(call: Callable[[int], Any]) -> str:
        errors = [attempt(lambda i=i: str(call(i).shape)) for i in scans]  # type: ignore[misc]
        failed = [error for error in errors if not error.startswith("torch.Size")]
        return f"{failed[0]} ({len(failed)} of {len(scans)})" if failed else "given"

    facts = {"decompose_resid": attempt(residual)}
    facts["effective attention"] = reconstructed(cache.compute_ssm_effective_attention) if scans else "no scan"
    facts["states"] = reconstructed(cache.compute_ssm_state) if scans else "no scan"
    patterns = [name for name in bridge.hook_dict if name.endswith("attn.hook_pattern")]
    facts["edit of a pattern"] = _edit(bridge, patterns, logits, tokens, torch.zeros_like)
    chosen = [name for name in bridge.hook_dict if name.endswith("hook_expert_indices")]
    has_experts = any("moe" in names for names in kinds)
    facts["edit of the routing"] = _edit(bridge, chosen, logits, tokens, lambda x: x.flip(-1)) if has_experts else ""
    facts |= _eager(bridge, model, tokens, scans)
    facts["wrong tokens"] = attempt(lambda: str(_wrong_tokens(bridge, model, tokens[:, :17])))
    return facts


def _eager(bridge: Any, model: HookedHybrid, tokens: Tensor, scans: list[int]) -> dict[str, str]:
    """With its own loop in place of transformers' scan: whether logits are right, and hidden attention."""
    names = ("logits with eager_scan", "effective attention then")
    if not scans:
        return dict.fromkeys(names, "no scan")
    blocks = [bridge.blocks[i] for i in scans]
    mixers = [getattr(block, name) for block in blocks for name in ("mixer", "mamba") if hasattr(block, name)]
    double = copy.deepcopy(model).double()
    exact, ours = double.run_with_cache(tokens)
    held: dict[str, Any] = {}

    def logits() -> str:
        found, held["cache"] = bridge.run_with_cache(tokens, use_cache=False)
        return f"error {number(relative_error(found, exact))}"

    def attention() -> str:
        found = held["cache"].compute_ssm_effective_attention(scans[0], include_dt_scaling=True)
        right = ours.hidden_attention(scans[0], include_skip=False)
        return f"error {number(relative_error(found.reshape(right.shape), right))}"

    for mixer in mixers:
        mixer.eager_scan = True
    try:
        found = attempt(logits)
        return dict(zip(names, (found, attempt(attention) if "cache" in held else ""), strict=True))
    finally:
        for mixer in mixers:
            mixer.eager_scan = False


def attempt(call: Callable[[], str]) -> str:
    """What a call gives, or the kind of error that it ends with."""
    try:
        return peers.quietly(call)
    except Exception as error:  # whatever a peer raises is what is to be told
        return type(error).__name__


def _edit(bridge: Any, names: list[str], logits: Tensor, tokens: Tensor, change: Callable[[Tensor], Tensor]) -> str:
    """Whether an edit at these hook points changes the logits."""
    if not names:
        return "no such site"

    def edited() -> str:
        hooks = [(name, lambda value, hook: change(value)) for name in names]
        return "nothing" if torch.equal(bridge.run_with_hooks(tokens, fwd_hooks=hooks), logits) else "logits change"

    return attempt(edited)


def _wrong_tokens(bridge: Any, model: HookedHybrid, prompt: Tensor) -> int:
    """Of new greedy tokens, against whole passes of ours in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
        got = bridge.generate(prompt, max_new_tokens=NEW_TOKENS, **options)
    double, right = copy.deepcopy(model).double(), prompt
    for _ in range(NEW_TOKENS):
        right = torch.cat([right, double(right)[:, -1:].argmax(-1)], 1)
    return int((got[:, -NEW_TOKENS:] != right[:, -NEW_TOKENS:]).sum())


def _exact_sweep(model: HookedHybrid, clean: Tensor, corrupted: Tensor) -> Tensor:
    """layer x position in float64: one whole forward pass per patch, with a hook."""
    double = copy.deepcopy(model).double()
    _, cache = double.run_with_cache(clean, names_filter="blocks.*.hook_resid_pre")
    values = torch.zeros(model.cfg.n_layers, clean.shape[1], dtype=torch.float64)
    for i in range(model.cfg.n_layers):
        name = f"blocks.{i}.hook_resid_pre"
        for t in range(clean.shape[1]):

            def put(value: Tensor, hook: Any, name: str = name, t: int = t) -> Tensor:
                value = value.clone()
                value[:, t] = cache[name][:, t]
                return value

            values[i, t] = metric(double.run_with_hooks(corrupted, fwd_hooks=[(name, put)]))
    return values
