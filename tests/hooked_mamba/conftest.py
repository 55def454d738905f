"""What the tests of the models share."""

from collections.abc import Callable
from typing import Any

import jaxtyping
import pytest

_check_annotations = jaxtyping.jaxtyped


def _only_lasting_functions(*args: Any, **kwargs: Any) -> Any:
    """Leave functions inside functions unchecked: each call makes them anew, and compiling their checks each time
    took nine tenths of a small model's forward."""
    decorate = _check_annotations(*args, **kwargs)
    if args or not callable(decorate):
        return decorate

    def decorated(fn: Callable) -> Callable:
        return fn if "<locals>" in fn.__qualname__ else decorate(fn)

    return decorated


jaxtyping.jaxtyped = _only_lasting_functions


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
    from tests.hooked_mamba.tiny import tokens_for  # imports the package, whose checks are arranged above first

    return tokens_for(model, rows=2, length=6)
