"""The fused all-to-all on one GPU: its ranks are processes that share it, over symmetric memory and over CUDA IPC. (Time-sliced: it shows
that the kernels are right, not how fast they are. python -m benchmarks fused measures them.)

    python -m pytest tests/distributed/test_fused_on_gpu.py --full
"""

from __future__ import annotations

import pytest
import torch
from distributed_pool import run_distributed

from tests.distributed.fused_ranks import Case, differences_on_gpu

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] < 9,
        reason="needs an NVIDIA GPU of compute capability 9 or newer",
    ),
]


@pytest.mark.parametrize("kind", ["symmetric", "ipc"])
@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("policy", ["static", "exact"])
def test_ranks_that_share_a_gpu_compute_what_the_all_to_all_does(policy, ranks, kind):
    case = Case((512, 300, 0, 77)[:ranks], 8, 64, 2048)
    assert run_distributed(differences_on_gpu, ranks, case, policy, kind, timeout=240) == [[]] * ranks
