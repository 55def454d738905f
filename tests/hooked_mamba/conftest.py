"""What the tests of the models share."""

import jaxtyping
import pytest


@pytest.fixture
def unchecked():
    """The annotation checker switched off: errors are those that users see."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def fast():
    """The same for a module of very many small calls; other modules check the annotations."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tokens(model):
    """Two rows of six tokens for the module's own `model`."""
    from tests.hooked_mamba.tiny import tokens_for  # not above: types are checked from pytest's start on

    return tokens_for(model, rows=2, length=6)
