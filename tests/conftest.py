"""Check shapes and types at run time in every test, and keep the tests apart from each other."""

import functools
import inspect
import typing
from typing import Any

import jaxtyping
from beartype import BeartypeConf, beartype

_jaxtyped = jaxtyping.jaxtyped
_beartype = beartype(conf=BeartypeConf(violation_type=jaxtyping.TypeCheckError))


def _checked(subject: Any = None, **options: Any) -> Any:
    """Check what the decorator of jaxtyping does, in less than half the time: arguments once, shapes where any are."""
    if subject is None:
        return functools.partial(_checked, **options)
    if not inspect.isfunction(subject) or inspect.isgeneratorfunction(subject):
        return _jaxtyped(subject, **options)
    try:
        hints = typing.get_type_hints(subject, include_extras=True)
    except NameError:  # a type that only pyright sees
        return _jaxtyped(subject, **options)
    checked = _beartype(subject)
    if "jaxtyping" not in str(hints):
        return checked

    @functools.wraps(subject)
    def within(*args: Any, **kwargs: Any) -> Any:
        with _jaxtyped("context"):  # equal names of dimensions are equal sizes within one call
            return checked(*args, **kwargs)

    return within


jaxtyping.jaxtyped = _checked
jaxtyping.install_import_hook("bitquorum", "beartype.beartype")  # before the package is imported for the first time

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from bitquorum import interface, rng  # noqa: E402
from bitquorum.quantizers import surrogate, twin  # noqa: E402

typing.runtime_checkable(interface.Model)  # lets the hook check that a model can be called
settings.register_profile("bitquorum", deadline=None, derandomize=True)
settings.load_profile("bitquorum")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _apart():
    """Start every test from one state of torch's generator, and fail the test that leaves ambient state behind."""
    with rng.torch_seed(0):
        yield
    assert rng.current() is None, "the test left a draw open"
    assert surrogate.ambient() is None, "the test left a surrogate open"
    assert twin.ambient() is None, "the test left a twin open"
    assert torch.get_default_dtype() == torch.float32, "the test left another default dtype"
    assert torch.is_grad_enabled(), "the test left gradients switched off"
