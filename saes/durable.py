"""Files that after a crash are either old or new: :mod:`hooked_mamba.durable`."""

from hooked_mamba.durable import DiskFullError as DiskFullError
from hooked_mamba.durable import room_for as room_for
from hooked_mamba.durable import sync as sync
from hooked_mamba.durable import write_file as write_file
from hooked_mamba.durable import write_through as write_through
