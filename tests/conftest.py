"""Check shapes and types at run time in every test, and keep tests deterministic and apart."""

import typing

from jaxtyping import install_import_hook

install_import_hook("bitquorum", "beartype.beartype")  # before the package is imported for the first time

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

from bitquorum import interface  # noqa: E402

typing.runtime_checkable(interface.Model)
settings.register_profile("bitquorum", deadline=None, derandomize=True)
settings.load_profile("bitquorum")
torch.set_num_threads(1)
