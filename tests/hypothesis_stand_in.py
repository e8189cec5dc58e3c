"""Lets files with property tests be imported where hypothesis is not installed; the property tests themselves skip."""

from __future__ import annotations

import inspect
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import pytest


def install() -> None:
    """Take hypothesis's place in sys.modules. Strategies are built when a file is imported, so they accept everything."""
    module = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None, origin=__file__)  # torch.compile looks for it
    module.given = _skipped
    module.settings = lambda *_, **__: lambda test: test
    module.assume = module.note = MagicMock()
    module.example = lambda *_, **__: lambda test: test
    module.HealthCheck = module.Phase = module.strategies = MagicMock()
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = module.strategies


def _skipped(*strategies, **named):
    """The last arguments of the test are drawn; pytest must see the others, which it fills itself."""

    def stand_in(test):
        names = [name for name in inspect.signature(test).parameters if name not in named]
        given = names[: len(names) - len(strategies)]

        def stands_for_the_test(**_):
            pytest.skip("hypothesis is not installed")

        stands_for_the_test.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in given])
        return stands_for_the_test

    return stand_in
