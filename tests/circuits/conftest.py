"""What tests of circuits share with those of the models."""

from tests.hooked_mamba.conftest import fast as fast
from tests.hooked_mamba.conftest import unchecked as unchecked
