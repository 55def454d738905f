"""The table of files and families in docs/loading.md: each cell is a test, here or where the row has its own files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hooked_mamba import HookedModel, load_model
from hooked_mamba.loading import from_hf_model
from hooked_mamba.loading.support import FAMILIES, SUPPORTED, support_table
from hooked_mamba.model.hooked_model import MODELS
from tests.hooked_mamba.loading.builders import assert_same
from tests.hooked_mamba.loading.families import CASES, family
from tests.hooked_mamba.loading.folders import MAKERS, files_of, write
from tests.hooked_mamba.loading.packing import WAYS
from tests.hooked_mamba.loading.test_files import write_shards
from tests.hooked_mamba.loading.test_mlx import CONVERTED

pytestmark = pytest.mark.usefixtures("unchecked")
ROOT = Path(__file__).parents[3]


def test_the_page_shows_the_table():
    assert support_table() in (ROOT / "docs" / "loading.md").read_text(encoding="utf-8")
    assert tuple(MAKERS) == FAMILIES
    assert all(set(families) <= set(FAMILIES) for families in SUPPORTED.values())


def test_every_row_of_packed_weights_has_a_writer():
    rows = list(SUPPORTED)
    assert set(WAYS) == set(rows[rows.index("bitsandbytes 8-bit") : rows.index("GGUF")])


def test_every_family_of_gguf_and_mlx_is_converted_by_its_test():
    """In gguf/test_families.py and test_mlx.py, which take their logits against the folder's."""
    assert {family(case) for case in CASES} == set(SUPPORTED["GGUF"])
    assert {family(case) for case in CONVERTED} == set(SUPPORTED["MLX"])


@pytest.mark.parametrize("family", SUPPORTED["safetensors"])
def test_safetensors(family, tmp_path):
    """As the object that the folder was saved from, which is held against the equations elsewhere."""
    made = MAKERS[family]().float()
    if not isinstance(made, HookedModel):
        cfg, _ = from_hf_model(made)
        made = next(cls for cls in MODELS.values() if type(cfg) is cls.config_class).from_hf(made)
    assert_same(load_model(write(tmp_path, *files_of(family))).state_dict(), made.state_dict())


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("family", SUPPORTED["safetensors, sharded"])
def test_shards(family, suffix, tmp_path):
    whole = load_model(write(tmp_path / "whole", *files_of(family))).state_dict()
    folder = write(tmp_path / "shards", *files_of(family))
    (folder / "model.safetensors").unlink()
    write_shards(folder, {n: v.contiguous() for n, v in files_of(family)[1].items()}, suffix)
    assert_same(load_model(folder).state_dict(), whole)


@pytest.mark.parametrize("family", SUPPORTED["PyTorch archive"])
def test_archives(family, tmp_path):
    whole = load_model(write(tmp_path / "whole", *files_of(family))).state_dict()
    folder = write(tmp_path / "archive", *files_of(family))
    (folder / "model.safetensors").unlink()
    torch.save(files_of(family)[1], folder / "pytorch_model.bin")
    assert_same(load_model(folder).state_dict(), whole)


@pytest.mark.parametrize("family", SUPPORTED["authors' own files"])
def test_the_authors_own_files(family, tmp_path):
    model = load_model(write(tmp_path / "hf", *files_of(family)))
    model.save_pretrained(tmp_path / "raw", format="raw")
    assert not (tmp_path / "raw" / "model.safetensors").exists()
    assert_same(load_model(tmp_path / "raw").state_dict(), model.state_dict())
