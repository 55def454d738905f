"""What the tests of the models share."""

import jaxtyping
import pytest
import torch

# Tiny models gain nothing from more threads, and lose much where other programs share the cores.
torch.set_num_threads(1)


@pytest.fixture
def unchecked():
    """The annotation checker switched off: errors are those that users see, and many small calls go fast."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
