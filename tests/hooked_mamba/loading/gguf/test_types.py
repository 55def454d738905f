"""Every type that gguf dequantises is read piece by piece as gguf reads it whole; shapes cost nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from hooked_mamba import load_model
from hooked_mamba.loading.gguf import types
from hooked_mamba.loading.gguf.header import read_header
from hooked_mamba.loading.shapes import only_shapes
from tests.hooked_mamba.loading.gguf.written import gguf, write

QUANTISED = [kind.name for kind in gguf.quants._type_traits if kind.name != "BF16"]


@pytest.mark.parametrize("kind", QUANTISED)
def test_pieces_are_the_whole(kind: str, tmp_path: Path) -> None:
    type_ = gguf.GGMLQuantizationType[kind]
    numbers, size = gguf.GGML_QUANT_SIZES[type_]
    rows, blocks = 301, -(-512 // numbers)
    assert rows * blocks * numbers > types.ELEMENTS_AT_ONCE
    data = np.random.default_rng(0).integers(0, 256, (rows, blocks * size), dtype=np.uint8)
    path = write(tmp_path / "one.gguf", "mamba", {}, {"w.weight": data}, types={"w.weight": kind})
    state = types.open_tensors(read_header(path))
    with only_shapes():
        assert state["w.weight"].is_meta
        assert state["w.weight"].shape == (rows, blocks * numbers)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(data, type_)
        found = state["w.weight"].numpy()
    np.testing.assert_array_equal(found, expected)


def test_names_of_types_are_those_of_gguf() -> None:
    known = {int(kind): kind.name for kind in gguf.GGMLQuantizationType}
    assert {number: known[number] for number in types.NAMES if number in known} == types.NAMES


def test_without_the_package_plain_files_load_and_quantised_ones_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.hooked_mamba.loading.gguf.small import mamba_file

    plain, quantised = mamba_file(tmp_path / "plain.gguf"), mamba_file(tmp_path / "q.gguf", kind="Q8_0")
    expected = load_model(plain)(torch.arange(5)[None])
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert torch.equal(load_model(plain)(torch.arange(5)[None]), expected)
    with pytest.raises(ValueError, match=r"q\.gguf: the tensor .* is quantised.*pip install 'hooked-mamba\[gguf\]'"):
        load_model(quantised)


def test_weights_are_taken_over_as_they_were_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the peak of memory is one copy of the model, whatever the file holds."""
    from tests.hooked_mamba.loading.gguf.small import mamba_file

    made: list[torch.Tensor] = []

    def watched(tensor: torch.Tensor) -> torch.Tensor:
        made.append(tensor)
        return mark(tensor)

    mark = types.fresh
    monkeypatch.setattr(types, "fresh", watched)
    model = load_model(mamba_file(tmp_path / "model.gguf", kind="Q8_0"))
    places = {tensor.data_ptr() for tensor in made}
    copied = {name for name, p in model.named_parameters() if p.data_ptr() not in places}
    # In another shape there, computed from what is there, and in float16, as its rows of three are no whole block.
    assert copied == {f"blocks.0.mixer.{name}" for name in ("conv1d.weight", "A_log", "dt_proj.weight")}
