"""Position -1 is each row's own last real token, on whichever side a batch is padded: every row is as it is alone."""

import pytest
import torch

from circuits import FrozenModel, Logit
from circuits.attribution import attribute
from circuits.interventions import ScaleEmbedding, ScaleState, intervene
from hooked_mamba.analysis import knockout, lens
from hooked_mamba.analysis.ablation import ablate
from saes import steer
from tests.hooked_mamba.hybrids.tiny import CASES as HYBRIDS
from tests.hooked_mamba.hybrids.tiny import tiny as hybrid
from tests.hooked_mamba.recurrent.models import CASES as RECURRENT
from tests.hooked_mamba.recurrent.models import tiny as recurrent
from tests.saes.models import sae_on, tiny

LENGTHS = (6, 3, 6, 5)
