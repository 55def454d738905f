"""Sparse autoencoders and MambaCoders: dictionaries on the internals of state-space models."""

from __future__ import annotations

from saes import diff as diff
from saes import saelens_names
from saes.coder import SAE as SAE
from saes.coder import MambaCoder as MambaCoder
from saes.coder import SparseCoder as SparseCoder
from saes.config import CoderConfig as CoderConfig
from saes.config import mambacoder_config as mambacoder_config
from saes.config import sae_config as sae_config
from saes.evaluation import evaluate as evaluate
from saes.evaluation import evaluate_activations as evaluate_activations
from saes.explorer import explore as explore
from saes.explorer import feature_explorer as feature_explorer
from saes.features import feature_logits as feature_logits
from saes.features import nearest_features as nearest_features
from saes.loss import Losses as Losses
from saes.loss_state import LossState as LossState
from saes.reading import Activations as Activations
from saes.reading import encode_on as encode_on
from saes.renamed import renamed_in
from saes.report import Report as Report
from saes.sparse import Codes as Codes
from saes.splicing import LatentEdit as LatentEdit
from saes.splicing import misses as misses
from saes.splicing import splice as splice
from saes.steering import ablate as ablate
from saes.steering import scale_features as scale_features
from saes.steering import set_features as set_features
from saes.steering import steer as steer
from saes.training import train_sae as train_sae

_renamed = renamed_in(__name__, {"Edit": "saes.splicing.LatentEdit"})


def __getattr__(name: str) -> object:
    """Old names, and what SAELens' names are here: as an ImportError, whose text `from saes import ...` shows."""
    if name in saelens_names.TOP:
        raise ImportError(saelens_names.advice(name, saelens_names.TOP))
    return _renamed(name)
