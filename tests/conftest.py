"""Paths and threads for all tests, and the end of the worker pools."""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: two test processes share the cores of a laptop
TESTS = Path(__file__).resolve().parent
for path in (TESTS, TESTS.parent):  # `import distributed_pool` and `import megatron_moe` without installing anything
    if str(path) not in sys.path:
        sys.path.insert(0, str(path))


def pytest_sessionfinish():
    import distributed_pool

    distributed_pool.close_pools()
