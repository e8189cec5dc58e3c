"""Lets files with property tests be imported where hypothesis is not installed; the property tests themselves skip."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from unittest.mock import MagicMock

import pytest


def install() -> None:
    """Take hypothesis's place in sys.modules. Strategies are built when a file is imported, so they accept everything."""
    module = ModuleType("hypothesis")
    module.__spec__ = ModuleSpec("hypothesis", None, origin=__file__)  # torch.compile looks for it
    module.given = lambda *_, **__: _skipped
    module.settings = lambda *_, **__: lambda test: test
    module.assume = module.note = MagicMock()
    module.example = lambda *_, **__: lambda test: test
    module.HealthCheck = module.strategies = MagicMock()
    sys.modules["hypothesis"] = module
    sys.modules["hypothesis.strategies"] = module.strategies


def _skipped(_):
    def stands_for_the_test():  # has no arguments: pytest would take them for fixtures
        pytest.skip("hypothesis is not installed")

    return stands_for_the_test
