"""Loading a quantised GGUF file beside transformers' own GGUF loading: seconds, and memory at the peak."""

from __future__ import annotations

import tempfile
import time
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from hooked_mamba import load_model
from tests.benchmarks import peers
from tests.benchmarks.child import call
from tests.benchmarks.memory import peak_above
from tests.benchmarks.report import Bound, Section, Table, number, relative_error
from tests.benchmarks.sizes import Sizes

ROUNDS = 3
TIME, MEMORY = 0.5, 1.1
"""Share of transformers' time, and copies of the weights, that we promise at most."""

WITH_TOKENIZER = "ours, with the tokenizer"
WHO = {"ours": "hooked_mamba", WITH_TOKENIZER: "hooked_mamba", "transformers": "accelerate"}
"""Contender -> the package without which it cannot take part."""


def _blocks(rng: np.random.Generator, rows: int, cols: int, kind: str) -> np.ndarray:
    """Random valid blocks of a quantised type, scaled so that weights are about 0.02."""
    import gguf

    numbers, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    n = rows * cols // numbers
    found = rng.integers(0, 256, (n, size), dtype=np.uint8)
    scales = {"Q4_K": (slice(0, 4), [2e-4, 1.5e-3]), "Q6_K": (slice(-2, None), [1e-5])}
    where, values = scales[kind]
    found[:, where] = np.tile(np.array(values, np.float16).view(np.uint8), (n, 1))
    return found.reshape(rows, -1)


def _vocabulary(size: int) -> tuple[list[str], list[str]]:
    """Twenty letters and words of them, each a letter longer than another; what merges into each word."""
    letters = list("abcdefghijklmnopqrst")
    tokens, merges, last = letters[:size], [], letters
    while len(tokens) < size:
        pairs = list(product(last, letters))[: size - len(tokens)]
        merges += [f"{word} {letter}" for word, letter in pairs]
        last = [word + letter for word, letter in pairs]
        tokens += last
    return tokens, merges


def write_file(path: Path, sizes: Sizes) -> None:
    """A Mamba-1 as llama.cpp's converter and quantiser leave it: embedding Q6_K, matrices Q4_K, the rest F32 or F16,
    with a vocabulary of as many tokens as the embedding has rows."""
    import gguf

    rng = np.random.default_rng(0)
    d, n, N, V = sizes.d_model, sizes.n_layers, sizes.N, sizes.d_vocab
    E, R = 2 * d, -(-d // 16)
    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(d)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(n)
    writer.add_ssm_conv_kernel(4)
    writer.add_ssm_inner_size(E)
    writer.add_ssm_state_size(N)
    writer.add_ssm_time_step_rank(R)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_ssm_dt_b_c_rms(False)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("olmo")
    tokens, merges = _vocabulary(V)
    writer.add_token_list(tokens)
    writer.add_token_types([1] * V)
    writer.add_token_merges(merges)

    def add(name: str, data: np.ndarray, kind: str = "F32") -> None:
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])

    def matrix(name: str, rows: int, cols: int, kind: str = "Q4_K") -> None:
        if cols % 256:
            add(name, (rng.standard_normal((rows, cols)) / 50).astype(np.float16), "F16")
        else:
            add(name, _blocks(rng, rows, cols, kind), kind)

    def vector(name: str, *shape: int) -> None:
        add(name, rng.uniform(0.5, 1.5, shape).astype(np.float32))

    matrix("token_embd.weight", V, d, "Q6_K")
    vector("output_norm.weight", d)
    for i in range(n):
        there = f"blk.{i}"
        vector(f"{there}.attn_norm.weight", d)
        matrix(f"{there}.ssm_in.weight", 2 * E, d)
        vector(f"{there}.ssm_conv1d.weight", E, 4)
        vector(f"{there}.ssm_conv1d.bias", E)
        matrix(f"{there}.ssm_x.weight", R + 2 * N, E)
        matrix(f"{there}.ssm_dt.weight", E, R)
        add(f"{there}.ssm_dt.bias", rng.uniform(-4, 0, E).astype(np.float32))
        add(f"{there}.ssm_a", -rng.uniform(1, N + 1, (E, N)).astype(np.float32))
        vector(f"{there}.ssm_d", E)
        matrix(f"{there}.ssm_out.weight", d, E)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _load(who: str, path: Path) -> Any:
    if who == WITH_TOKENIZER:
        model = load_model(path)
        assert model.tokenizer is not None
        return model
    if who == "ours":
        return load_model(path, tokenizer=object())  # one that is there already, so that none is made
    return transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32
    ).eval()


def measure(sizes: Sizes, who: str, path: str, warm: str) -> dict[str, float]:
    """Seconds of the processor, MiB at the peak above what was there, and MiB of the weights."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    _load(who, Path(warm))  # what is imported on the way is no cost of a model
    kept: list[Any] = []
    took: list[float] = []

    def run() -> None:
        start = time.process_time()
        kept.append(_load(who, Path(path)))
        took.append(time.process_time() - start)

    peak = peak_above(run)
    weights = sum(p.numel() * p.element_size() for p in kept[0].parameters()) / 2**20
    return {"seconds": took[0], "peak": float("nan") if peak is None else peak, "weights": weights}


def _logits(who: str, path: Path, tokens: torch.Tensor) -> torch.Tensor:
    found = _load(who, path)(tokens)
    return found if isinstance(found, torch.Tensor) else found.logits


@torch.no_grad()
def run(sizes: Sizes) -> Section:
    """Both from one file, each in fresh processes, in turns."""
    section = Section(
        "Loading a GGUF file",
        f"A Mamba-1 of the shape {sizes.d_model} x {sizes.n_layers} with {sizes.d_vocab:,} tokens, matrices in Q4_K,"
        " the embedding in Q6_K, to float32; the tokenizer of the file is made in the row that says so. Seconds are"
        f" processor time, the median of {ROUNDS} fresh processes that have loaded a tiny file before; memory is that"
        " at the peak above what was resident before, the model included.",
        remarks=peers.remarks(*set(WHO.values())),
    )
    taking_part = [who for who, package in WHO.items() if peers.why_missing(package) is None]
    with tempfile.TemporaryDirectory() as folder:
        path, warm = Path(folder) / "model.gguf", Path(folder) / "warm" / "model.gguf"
        warm.parent.mkdir()
        write_file(path, sizes)
        write_file(warm, Sizes(**{**vars(sizes), "d_model": 32, "n_layers": 1, "d_vocab": 40}))
        rounds: dict[str, list[dict[str, float]]] = {who: [] for who in taking_part}
        for _ in range(ROUNDS if sizes.fresh_process else 1):
            for who, found in rounds.items():
                found.append(call("tests.benchmarks.loading:measure", sizes, who=who, path=str(path), warm=str(warm)))
        tokens = torch.randint(0, sizes.d_vocab, (1, 9), generator=torch.Generator().manual_seed(0))
        ours = _logits("ours", path, tokens).double()
        errors = {who: relative_error(_logits(who, path, tokens), ours) for who in taking_part if who != "ours"}
    middle = {who: {name: median(one[name] for one in found) for name in found[0]} for who, found in rounds.items()}
    rows = [
        [
            who,
            number(one["seconds"]),
            number(one["peak"]),
            number(one["peak"] / one["weights"]),
            number(errors[who]) if who in errors else "0",
        ]
        for who, one in middle.items()
    ]
    columns = ["", "seconds", "MiB at the peak", "copies of the weights", "difference from ours"]
    section.tables.append(Table("One load", columns, rows))
    if sizes.claims:
        mine = middle["ours"]
        section.bounds.append(Bound("Copies of the weights at the peak", mine["peak"] / mine["weights"], MEMORY, False))
        if "transformers" in middle:
            share = mine["seconds"] / middle["transformers"]["seconds"]
            section.bounds.append(Bound("Time, as a share of transformers'", share, TIME, False))
    return section
