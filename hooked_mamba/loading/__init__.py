"""Checkpoints: finding them, reading them by table, and writing them back."""

from hooked_mamba.loading.checkpoint import Checkpoint as Checkpoint
from hooked_mamba.loading.checkpoint import load_checkpoint as load_checkpoint
from hooked_mamba.loading.files import bundled_names as bundled_names
from hooked_mamba.loading.hf_model import from_hf_model as from_hf_model
from hooked_mamba.loading.hf_model import to_hf_model as to_hf_model
from hooked_mamba.loading.save import save_checkpoint as save_checkpoint
from hooked_mamba.loading.tables import CheckpointError as CheckpointError
from hooked_mamba.loading.weights import float32_names as float32_names
from hooked_mamba.loading.weights import load_into as load_into
from hooked_mamba.loading.weights import target_dtype as target_dtype
