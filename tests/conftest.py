"""Paths and threads for all tests, the policy on skips, the end of the worker pools."""

import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two test processes share the cores of a laptop
# A shell ignores SIGINT for what it starts in the background, and every process under it inherits that: tests that interrupt would wait.
signal.signal(signal.SIGINT, signal.default_int_handler)
TESTS = Path(__file__).resolve().parent
for path in (TESTS, TESTS.parent):  # `import distributed_pool` and `import megatron_moe` without installing anything
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))

if importlib.util.find_spec("hypothesis") is None:  # an extra: with the core packages alone the other tests run all the same
    import hypothesis_stand_in

    hypothesis_stand_in.install()


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the tests marked `matrix`, too: every layout")
    parser.addoption("--allowed-skips", metavar="FILE", help="fail when a test skips for a reason that matches no line of FILE")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--full"):
        left_out = [item for item in items if item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not item.get_closest_marker("matrix")]


def pytest_configure(config):
    if path := config.getoption("--allowed-skips"):
        from skip_policy import SkipPolicy, read_allowed

        try:
            config.pluginmanager.register(SkipPolicy(read_allowed(path)))
        except (OSError, ValueError) as error:
            raise pytest.UsageError(f"--allowed-skips: {error}") from None


def pytest_sessionfinish():
    import distributed_pool

    distributed_pool.close_pools()
