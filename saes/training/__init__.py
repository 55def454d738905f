"""Training: many coders at once over one store, resumable at any moment."""

from hooked_mamba.names_elsewhere import SAE_LENS, import_advice
from saes.renamed import renamed_in
from saes.saelens_names import TOP
from saes.training.checkpoint import ResumeError as ResumeError
from saes.training.coder_run import calibrate as calibrate
from saes.training.config import TrainConfig as TrainConfig
from saes.training.finetune import finetune_coders as finetune_coders
from saes.training.finetune_config import FinetuneConfig as FinetuneConfig
from saes.training.loop import TrainingLoop as TrainingLoop
from saes.training.loop import TrainResult as TrainResult
from saes.training.run import RunConfig as RunConfig
from saes.training.run import coder_config as coder_config
from saes.training.run import load_model as load_model
from saes.training.run import run as run
from saes.training.run import train_coders as train_coders
from saes.training.run import train_sae as train_sae
from saes.training.trainer import Trainer as Trainer
from saes.training.world import World as World
from saes.training.world import local_device as local_device
from saes.training.world import torchrun as torchrun

_renamed = renamed_in(__name__, {"CheckpointError": "saes.training.checkpoint.ResumeError"})
__getattr__ = import_advice(__name__, TOP, _renamed, SAE_LENS)
