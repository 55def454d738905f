"""Spoilt GGUF files: each is refused in words that name the file, the key or tensor, and the cause."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hooked_mamba import load_model
from hooked_mamba.loading import CheckpointError
from hooked_mamba.loading.gguf.common import _refuse_scaled_positions
from hooked_mamba.loading.gguf.keys import Keys
from tests.hooked_mamba.loading.gguf.small import D, E, N, mamba_file, tensors
from tests.hooked_mamba.loading.gguf.written import write

Spoil = Callable[[bytearray], bytes | bytearray | None]


def _at(data: bytearray, name: str) -> int:
    """The first byte behind a name in the header."""
    return data.index(name.encode()) + len(name)


def put(code: str, value: int, name: str | None = None, skip: int = 0) -> Spoil:
    """Overwrite a number, `skip` bytes behind a name or the beginning of the file."""

    def spoil(data: bytearray) -> None:
        struct.pack_into(f"<{code}", data, skip + (0 if name is None else _at(data, name)), value)

    return spoil


def cut(size: int) -> Spoil:
    """Only the first bytes (from the end where negative)."""
    return lambda data: data[:size]


AXES, TYPE, OFFSET = 4, 4 + 16, 4 + 16 + 4
"""Of a matrix, behind its name: its axes, its type, its place."""

BYTES: dict[str, tuple[Spoil, str]] = {
    "empty": (lambda data: b"", "is empty"),
    "another format": (lambda data: b"GGML" + data[4:], r"is not a GGUF file \(it starts with b'GGML'"),
    "a pointer": (lambda data: b"version https://git-lfs.github.com/spec/v1\n", "is a git-lfs pointer"),
    "version 1": (put("I", 1, skip=4), "is of GGUF version 1; expected 2 or 3"),
    "big-endian": (lambda data: data[:4] + b"\0\0\0\x03" + data[8:], "is big-endian"),
    "only the start": (cut(20), "is truncated: it has 20 bytes"),
    "half the header": (cut(700), "the file is truncated or damaged"),
    "half the numbers": (cut(-5000), r"is truncated: the tensor blk\.0\.\w+(\.\w+)? ends at byte"),
    "more tensors than bytes": (put("Q", 2**60, skip=8), r"there are 1,152,921,504,606,846,976 tensors"),
    "more keys than bytes": (put("Q", 2**60, skip=16), r"there are 1,152,921,504,606,846,976 keys"),
    "more tensors than there are": (put("Q", 40, skip=8), "the tensor  has 0 axes"),
    "an endless name": (put("Q", 2**40, skip=24), r"the name of key 0 is 1,099,511,627,776 bytes long"),
    "a value of no type": (put("I", 99, "mamba.block_count"), r"the key mamba\.block_count is of type 99"),
    "a length for a number": (put("I", 7, "mamba.block_count"), "the name of key 3 is 352,321,536 bytes long"),
    "seven axes": (put("I", 7, "blk.0.ssm_in.weight"), r"the tensor blk\.0\.ssm_in\.weight has 7 axes"),
    "an axis of none": (put("Q", 0, "blk.0.ssm_in.weight", AXES), r"ssm_in\.weight has the shape \(128, 0\)"),
    "an axis without end": (
        put("Q", 2**62, "blk.0.ssm_in.weight", AXES),
        r"ssm_in\.weight has the shape .*no tensor has",
    ),
    "a type of no name": (
        put("I", 77, "blk.0.ssm_in.weight", TYPE),
        r"ssm_in\.weight is of type 77, which is not known",
    ),
    "whole numbers": (put("I", 26, "blk.0.ssm_in.weight", TYPE), r"ssm_in\.weight holds whole numbers \(I32\)"),
    "no whole blocks": (
        put("I", 12, "blk.0.ssm_in.weight", TYPE),
        r"ssm_in\.weight has rows of 32, .* blocks of 256 \(Q4_K\)",
    ),
    "beyond the end": (
        put("Q", 2**40, "blk.0.ssm_in.weight", OFFSET),
        r"truncated: the tensor blk\.0\.ssm_in\.weight ends",
    ),
    "crooked": (put("Q", 7, "blk.0.ssm_in.weight", OFFSET), r"ssm_in\.weight begins at 7; expected a multiple of 32"),
    "a tensor twice": (
        lambda data: data.replace(b"blk.0.ssm_a", b"blk.0.ssm_d", 1),
        r"the tensor blk\.0\.ssm_d is there twice",
    ),
    "a key twice": (
        lambda data: data.replace(b"mamba.ssm.inner_size", b"mamba.ssm.state_size", 1),
        r"the key 'mamba\.ssm\.state_size' is there twice",
    ),
    "no UTF-8": (
        lambda data: data.replace(b"mamba.block_count", b"mamba.block_coun\xff", 1),
        "the name of key .* is no UTF-8",
    ),
}


@pytest.mark.parametrize("case", BYTES)
def test_damaged_bytes(case: str, tmp_path: Path) -> None:
    spoil, match = BYTES[case]
    path = mamba_file(tmp_path / "spoilt.gguf")
    data = bytearray(path.read_bytes())
    changed = spoil(data)
    path.write_bytes(data if changed is None else changed)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    assert "spoilt.gguf" in str(caught.value)


KEYS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": ({".ssm.state_size": None}, r"lacks the key mamba\.ssm\.state_size; expected a whole number"),
    "text for a number": ({".ssm.inner_size": "wide"}, r"mamba\.ssm\.inner_size is 'wide'; expected a whole number"),
    "a list for a number": ({".block_count": [1, 1]}, r"mamba\.block_count is 2 entries; expected a whole number"),
    "none": ({".ssm.time_step_rank": 0}, r"mamba\.ssm\.time_step_rank is 0; expected a whole number of at least 1"),
    "very many blocks": (
        {".block_count": 2**31 - 1},
        r"mamba\.block_count is 2147483647; expected no more than the file's",
    ),
    "two blocks of one": ({".block_count": 2}, r"missing: blk\.1\.attn_norm\.weight"),
    "eps of none": (
        {".attention.layer_norm_rms_epsilon": 0.0},
        r"layer_norm_rms_epsilon is 0\.0; expected a number above",
    ),
    "eps without end": (
        {".attention.layer_norm_rms_epsilon": float("inf")},
        r"layer_norm_rms_epsilon is inf; expected a finite number",
    ),
    "a flag that is none": ({".ssm.dt_b_c_rms": 3}, r"mamba\.ssm\.dt_b_c_rms is 3; expected a boolean"),
    "another width": (
        {".embedding_length": 48},
        r"embedding_length is 48; expected 32, the width of token_embd\.weight",
    ),
    "another state": ({".ssm.state_size": 8}, r"blk\.0\.ssm_a in spoilt\.gguf got \(64, 4\), expected \(64, 8\)"),
    "a crooked alignment": ({"general.alignment": 12}, r"general\.alignment is 12; expected a multiple of 8"),
    "an adapter": ({"general.type": "adapter"}, r"is of general\.type='adapter', no whole model"),
    "one of several files": (
        {"split.count": 3},
        r"is one of 3 files that hold one model, .* such as model-00001-of-00003\.gguf",
    ),
    "a list of files": ({"split.count": [1, 1]}, "split.count is 2 entries; expected a number of files"),
    "a list for a type": ({"general.type": [1, 2]}, r"is of general\.type='2 entries', no whole model"),
}


@pytest.mark.parametrize("case", KEYS)
def test_wrong_keys(case: str, tmp_path: Path) -> None:
    changed, match = KEYS[case]
    path = mamba_file(tmp_path / "spoilt.gguf", changed)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    assert "spoilt.gguf" in str(caught.value)


ONE_BAD = tensors()["blk.0.ssm_in.weight"].index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(float("nan")))
TENSORS: dict[str, tuple[dict[str, Any], str]] = {
    "missing": (
        {"blk.0.ssm_x.weight": None},
        r"missing: blk\.0\.ssm_x\.weight, which is blocks\.0\.mixer\.x_proj\.weight",
    ),
    "no embedding": ({"token_embd.weight": None}, r"lacks the tensor token_embd\.weight, which determines sizes"),
    "unexpected": (
        {"blk.0.ssm_new.weight": torch.ones(3)},
        r"unexpected: blk\.0\.ssm_new\.weight in spoilt\.gguf \(3,\)",
    ),
    "of another block": ({"blk.7.ssm_d": torch.ones(E)}, r"unexpected: blk\.7\.ssm_d in spoilt\.gguf"),
    "another shape": (
        {"blk.0.ssm_d": torch.ones(E + 1)},
        r"blk\.0\.ssm_d in spoilt\.gguf got \(65,\), expected \(64,\)",
    ),
    "turned": (
        {"blk.0.ssm_out.weight": torch.ones(E, D)},
        r"ssm_out\.weight in spoilt\.gguf got \(64, 32\), expected \(32, 64\)",
    ),
    "A above zero": (
        {"blk.0.ssm_a": torch.ones(E, N)},
        r"blk\.0\.ssm_a in spoilt\.gguf has 256 values that are not negative",
    ),
    "NaN": ({"blk.0.ssm_in.weight": ONE_BAD}, r"not finite: blk\.0\.ssm_in\.weight in spoilt\.gguf has 1 NaN"),
    "an embedding of one axis": (
        {"token_embd.weight": torch.ones(D)},
        r"token_embd\.weight has the shape \(32,\); expected 2 axes",
    ),
}


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensors(case: str, tmp_path: Path) -> None:
    changed, match = TENSORS[case]
    path = mamba_file(tmp_path / "spoilt.gguf", changed=changed)
    with pytest.raises(CheckpointError, match=match) as caught:
        load_model(path)
    assert "spoilt.gguf" in str(caught.value)


@pytest.mark.parametrize(
    ("architecture", "match"),
    [
        ("llama", r"is of the architecture 'llama'; expected one of mamba, mamba2"),
        ("plamo2", r"is of the architecture 'plamo2', which is not supported: its norms"),
        ("mamba2", r"the key mamba2\.ssm\.time_step_rank is 3; expected a number of heads that 64 channels divide"),
    ],
)
def test_other_architectures(architecture: str, match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        load_model(mamba_file(tmp_path / "spoilt.gguf", architecture=architecture))


def test_more_heads_than_queries(tmp_path: Path) -> None:
    """Refused before a list is made with an entry for each of them."""
    keys = {".embedding_length": D, ".block_count": 1, ".attention.layer_norm_rms_epsilon": 1e-6}
    keys |= {".attention.head_count": 2**30, ".attention.head_count_kv": 2, ".feed_forward_length": 8}
    names = ("attn_q.weight", "ffn_gate.weight")
    state = {"token_embd.weight": torch.ones(9, D)} | {f"blk.0.{name}": torch.ones(64, D) for name in names}
    path = write(tmp_path / "spoilt.gguf", "qwen35", keys, state)
    with pytest.raises(CheckpointError, match=r"head_count is 1073741824; .* 64 rows of blk\.0\.attn_q\.weight"):
        load_model(path)


def test_no_architecture(tmp_path: Path) -> None:
    data = mamba_file(tmp_path / "a.gguf").read_bytes()
    (tmp_path / "spoilt.gguf").write_bytes(data.replace(b"general.architecture", b"general.architectura", 1))
    with pytest.raises(CheckpointError, match=r"spoilt\.gguf has no general\.architecture; expected one of mamba"):
        load_model(tmp_path / "spoilt.gguf")


def test_files_that_were_put_together_again(tmp_path: Path) -> None:
    """llama-gguf-split --merge keeps the first part's keys, and writes that there are 0 parts."""
    keys = {"split.count": 0, "split.no": 0, "split.tensors.count": 12}
    assert load_model(mamba_file(tmp_path / "merged.gguf", keys)).cfg.d_model == D


@pytest.mark.parametrize("key", ["rope.scaling.factor", "rope.scale_linear"])
def test_positions_that_are_divided(key: str, tmp_path: Path) -> None:
    """A factor alone is one of the type "linear" for llama.cpp."""
    values = {f"mamba.{key}": 4.0, "general.architecture": "mamba"}
    with pytest.raises(CheckpointError, match=rf"mamba\.{key} is 4\.0; expected 1, or rope\.scaling\.type 'none'"):
        _refuse_scaled_positions(Keys(values))
    _refuse_scaled_positions(Keys(values | {"mamba.rope.scaling.type": "none"}))
    _refuse_scaled_positions(Keys(values | {f"mamba.{key}": 1.0}))
    with pytest.raises(CheckpointError, match=r"rope\.scaling\.type is 1 entries; expected 'none'"):
        _refuse_scaled_positions(Keys(values | {"mamba.rope.scaling.type": np.zeros(1)}))


def test_numbers_that_do_not_fit_each_other(tmp_path: Path) -> None:
    keys = {".embedding_length": D, ".block_count": 1, ".attention.layer_norm_rms_epsilon": 1e-5}
    keys |= {".ssm.inner_size": 64, ".ssm.time_step_rank": 8, ".ssm.group_count": 3, ".ssm.state_size": 4}
    path = write(
        tmp_path / "spoilt.gguf",
        "mamba2",
        keys | {".ssm.conv_kernel": 4},
        {"token_embd.weight": np.ones((9, D), np.float32)},
    )
    with pytest.raises(CheckpointError, match=r"spoilt\.gguf: 8 heads cannot be shared evenly by n_groups=3"):
        load_model(path)


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    one = mamba_file(tmp_path / "one.gguf")
    assert load_model(tmp_path).cfg.d_model == D
    assert load_model(one).cfg.model_name == "one"
    mamba_file(tmp_path / "two.gguf")
    with pytest.raises(CheckpointError, match=r"holds several GGUF files, one\.gguf, two\.gguf; give the path of one"):
        load_model(tmp_path)


def test_any_other_damage_is_an_error_of_ours_or_none(tmp_path: Path) -> None:
    """Numbers overwritten and bytes left out at random; 4,000 such files were read once."""
    base, draw = mamba_file(tmp_path / "whole.gguf", kind="Q8_0").read_bytes(), random.Random(0)
    header = base.index(b"token_embd.weight") + 900
    messages = []
    for _ in range(100):
        data, at = bytearray(base), draw.randrange(24, header)
        filling = draw.choice([b"\xff" * 8, b"\0" * 8, b"\0" * 7 + b"\x40", bytes([draw.randrange(256)])])
        data[at : at + draw.choice([0, 1, len(filling)])] = filling
        (tmp_path / "spoilt.gguf").write_bytes(data)
        try:
            load_model(tmp_path / "spoilt.gguf")
        except CheckpointError as error:
            messages.append(str(error))
    assert len(messages) > 50
    assert all("spoilt.gguf" in message for message in messages)
