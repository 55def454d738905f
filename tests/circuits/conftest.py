"""What tests of circuits share with those of the models; importing it also spares inner functions their checks."""

from tests.hooked_mamba.conftest import fast as fast
from tests.hooked_mamba.conftest import unchecked as unchecked
