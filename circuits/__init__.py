"""Exact attribution and circuits: what a logit or a feature is made of, traced through frozen state-space models."""

from __future__ import annotations

from circuits.attribution import Attribution as Attribution
from circuits.attribution import attribute as attribute
from circuits.attribution import attribute_heads as attribute_heads
from circuits.build import build_graph as build_graph
from circuits.extract import Circuit as Circuit
from circuits.extract import extract_circuit as extract_circuit
from circuits.faithfulness import faithfulness as faithfulness
from circuits.files import load_graph as load_graph
from circuits.files import save_graph as save_graph
from circuits.frozen_model import FrozenModel as FrozenModel
from circuits.graph import Graph as Graph
from circuits.graph import Node as Node
from circuits.influence import influence as influence
from circuits.influence import prune as prune
from circuits.influence import scores as scores
from circuits.influence import total_effects as total_effects
from circuits.integrated import IntegratedGradients as IntegratedGradients
from circuits.integrated import NodeEffects as NodeEffects
from circuits.integrated import integrated_gradients as integrated_gradients
from circuits.integrated import node_effects as node_effects
from circuits.interventions import CutHead as CutHead
from circuits.interventions import CutTokens as CutTokens
from circuits.interventions import ScaleEmbedding as ScaleEmbedding
from circuits.interventions import ScaleError as ScaleError
from circuits.interventions import ScaleFeature as ScaleFeature
from circuits.interventions import ScaleState as ScaleState
from circuits.interventions import SetFeature as SetFeature
from circuits.interventions import SetState as SetState
from circuits.interventions import edit_of as edit_of
from circuits.interventions import frozen_effects as frozen_effects
from circuits.interventions import intervened as intervened
from circuits.patch_effects import PatchEffects as PatchEffects
from circuits.patch_effects import patch_effects as patch_effects
from circuits.paths import greedy_path as greedy_path
from circuits.paths import top_paths as top_paths
from circuits.published import PathOptions as PathOptions
from circuits.targets import Channel as Channel
from circuits.targets import Direction as Direction
from circuits.targets import Feature as Feature
from circuits.targets import Logit as Logit
from circuits.targets import top_logits as top_logits
from circuits.trace import Trace as Trace
from circuits.trace import trace_paths as trace_paths
from hooked_mamba.renamed import renamed_in

__getattr__ = renamed_in(__name__, {"Head": "circuits.targets.Channel"})
