"""The ops: one signature each, one file per backend, and one choice of backend (`hooked_mamba.ops.choose`)."""

from hooked_mamba.ops.causal_conv1d.op import causal_conv1d as causal_conv1d
from hooked_mamba.ops.choose import BACKENDS as BACKENDS
from hooked_mamba.ops.choose import ENVIRONMENT as ENVIRONMENT
from hooked_mamba.ops.choose import Backend as Backend
from hooked_mamba.ops.choose import backend as backend
from hooked_mamba.ops.choose import choose as choose
from hooked_mamba.ops.delta_scan._rows import delta_rows as delta_rows
from hooked_mamba.ops.delta_scan.op import delta_scan as delta_scan
from hooked_mamba.ops.elementwise.op import silu as silu
from hooked_mamba.ops.elementwise.op import softplus as softplus
from hooked_mamba.ops.interface import DeltaScanOut as DeltaScanOut
from hooked_mamba.ops.interface import ScanOut as ScanOut
from hooked_mamba.ops.interface import StateEdits as StateEdits
from hooked_mamba.ops.linear_scan.op import linear_scan as linear_scan
from hooked_mamba.ops.selective_scan.op import gated_scan as gated_scan
from hooked_mamba.ops.selective_scan.op import pull_scan as pull_scan
from hooked_mamba.ops.selective_scan.op import selective_scan as selective_scan
from hooked_mamba.ops.ssd.op import default_chunk as default_chunk
from hooked_mamba.ops.ssd.op import ssd as ssd
