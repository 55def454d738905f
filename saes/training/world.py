"""The processes of a training: :mod:`hooked_mamba.world`."""

from hooked_mamba.world import World as World
from hooked_mamba.world import local_device as local_device
from hooked_mamba.world import torchrun as torchrun
