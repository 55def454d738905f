"""Interventions on the nodes of a graph, in the real model or the frozen one."""

from __future__ import annotations

from circuits.interventions.edits import CutHead as CutHead
from circuits.interventions.edits import CutTokens as CutTokens
from circuits.interventions.edits import Intervention as Intervention
from circuits.interventions.edits import ScaleEmbedding as ScaleEmbedding
from circuits.interventions.edits import ScaleError as ScaleError
from circuits.interventions.edits import ScaleFeature as ScaleFeature
from circuits.interventions.edits import ScaleState as ScaleState
from circuits.interventions.edits import ScaleUnit as ScaleUnit
from circuits.interventions.edits import SetFeature as SetFeature
from circuits.interventions.edits import SetState as SetState
from circuits.interventions.free import intervened as intervened
from circuits.interventions.frozen import frozen_effects as frozen_effects
from circuits.interventions.nodes import edit_of as edit_of
from hooked_mamba.renamed import renamed_in

__getattr__ = renamed_in(__name__, {"Edit": "circuits.interventions.Intervention"})
