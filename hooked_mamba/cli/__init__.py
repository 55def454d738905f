"""The command line `hooked-mamba`: commands of this package, and those that others bring by entry points.

Nothing here imports torch before a command runs, so that help comes at once.
"""

from hooked_mamba.cli.app import GROUP as GROUP
from hooked_mamba.cli.app import main as main
from hooked_mamba.cli.app import make_app as make_app
from hooked_mamba.cli.base import DEFAULT_MODEL as DEFAULT_MODEL
from hooked_mamba.cli.base import ModelOption as ModelOption
from hooked_mamba.cli.base import console as console
from hooked_mamba.cli.base import new_app as new_app
from hooked_mamba.cli.base import reports_errors as reports_errors
from hooked_mamba.cli.base import table as table
from hooked_mamba.cli.inputs import check_inputs as check_inputs
