"""Ranks of one machine are reachable from that machine only: `torch.distributed` must not open a port to the network."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

PROGRAM = """
import glob, os
import torch, torch.distributed as dist
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.training.distributed import init_distributed
from megatron_moe.utils.groups import end_groups

world = init_distributed(ParallelConfig())
total = torch.ones(())
dist.all_reduce(total)
assert total == world.size
links = [os.readlink(f) for f in glob.glob("/proc/self/fd/*") if os.path.islink(f)]
mine = {link[8:-1] for link in links if link.startswith("socket:[")}
LISTENING = "0A"
for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
    if os.path.exists(table):
        for line in open(table).readlines()[1:]:
            _, address, _, state, *_, inode = line.split()[:10]
            if state == LISTENING and inode in mine:
                print("listens on", address.partition(":")[0], flush=True)
dist.barrier()
end_groups()
"""


@pytest.mark.distributed
@pytest.mark.skipif(not os.path.exists("/proc/self/net/tcp"), reason="finds sockets through /proc")
def test_nothing_listens_beyond_this_machine(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(tmp_path / "store"), "--rdzv-conf", "store_type=file"]  # as scripts/common.sh
    command = [sys.executable, "-m", "torch.distributed.run", *meet, "--local-addr", "127.0.0.1", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    done = subprocess.run([*command, str(tmp_path / "program.py")], env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    listens = [line.split()[-1] for line in done.stdout.splitlines() if line.startswith("listens on")]
    assert listens, "the sockets were not found"
    assert set(listens) == {"0100007F"}, listens  # 127.0.0.1
