"""GB/s of saving, loading and loading into another layout, against a raw write or read of as many bytes

The state is 48 float32 tensors of 268 MB together. A save ends when everything is on the disk: ours writes through
torch.distributed.checkpoint, makes checksums on the way, writes a manifest and renames, and removes the one before; the limit writes as many bytes into one file and waits
for the disk (fsync). torch.save and safetensors do the same as one file, and plain torch.distributed.checkpoint without checks. Everything
that is loaded comes from the page cache, into tensors that are there; ours with and without the checksums that a start compares.

Other layouts: two gloo ranks save shards along dim 0 and load them as they are, along dim 1 (another tensor-parallel cut), and whole on each
(from ZeRO to none), seconds between barriers. What a step waits with --async-save: python -m benchmarks async_saving.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, zeros

from benchmarks.harness import Options, Report, System, Times, interleave, missing, paired_ratio, spread, table
from megatron_moe.checkpoint.files import problems_in
from megatron_moe.checkpoint.load import load_tensors
from megatron_moe.checkpoint.manager import CheckpointManager
from megatron_moe.utils.groups import end_groups

PEERS = {"safetensors": "save_file and load_file, as one file"}
ROUNDS = 5
WRITE, READ = "raw write and fsync", "raw read"
OURS_SAVE, OURS_LOAD, OURS_VERIFY = "save: ours", "load: ours", "load: ours, checksums first"
LAYOUTS = {"the same shards": Shard(0), "shards of another dim": Shard(1), "whole on each rank": Replicate()}


def state_of(width: int, count: int = 48) -> dict[str, Tensor]:
    """Weights and two moments of each."""
    draw = torch.Generator().manual_seed(1)
    kinds = ("model.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.")
    return {f"{kinds[i % 3]}{i // 3}.weight": torch.randn(width, width, generator=draw) for i in range(count)}


class Disk:
    """The systems; each leaves what it has written until it is written anew."""

    def __init__(self, folder: Path, state: dict[str, Tensor]):
        self.folder, self.state, self.number = folder, state, 0
        self.size = sum(t.numel() * t.element_size() for t in state.values())
        self.target = {name: torch.empty_like(t) for name, t in state.items()}
        self.raw, self.room = (memoryview(torch.ones(self.size, dtype=torch.uint8).numpy()) for _ in range(2))
        self.manager = CheckpointManager(folder / "ours", keep_last=1)

    def write(self) -> None:
        with open(self.folder / "raw", "wb") as file:
            file.write(self.raw)
            synced(file)

    def read(self) -> None:
        with open(self.folder / "raw", "rb", buffering=0) as file:
            assert file.readinto(self.room) == self.size

    def save(self) -> None:
        self.number += 1
        self.path = self.manager.save(self.number, self.state, {})

    def load(self, verify: bool) -> None:
        if verify:
            assert not problems_in(self.path, "crc")
        load_tensors(self.path, self.target)

    def torch_save(self) -> None:
        with open(self.folder / "torch", "wb") as file:
            torch.save(self.state, file)
            synced(file)

    def torch_load(self) -> None:
        torch.load(self.folder / "torch", weights_only=True)

    def dcp_save(self) -> None:
        shutil.rmtree(self.folder / "dcp", ignore_errors=True)
        dcp.save(self.state, storage_writer=dcp.FileSystemWriter(self.folder / "dcp"), no_dist=True)

    def dcp_load(self) -> None:
        dcp.load(self.target, storage_reader=dcp.FileSystemReader(self.folder / "dcp"), no_dist=True)

    def safetensors_save(self) -> None:
        from safetensors.torch import save_file

        save_file(self.state, self.folder / "safetensors")
        with open(self.folder / "safetensors", "rb+") as file:
            os.fsync(file.fileno())

    def safetensors_load(self) -> None:
        from safetensors.torch import load_file

        for name, tensor in load_file(self.folder / "safetensors").items():
            self.target[name].copy_(tensor)  # its pages are read only now


def synced(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def systems_of(disk: Disk, skipped: dict[str, str]) -> dict[str, Callable[[], None]]:
    """Each save stands before the load of what it has written."""
    found = {
        WRITE: disk.write, READ: disk.read, OURS_SAVE: disk.save, OURS_LOAD: partial(disk.load, False), OURS_VERIFY: partial(disk.load, True),
        "save: torch.save": disk.torch_save, "load: torch.load": disk.torch_load, "save: plain DCP": disk.dcp_save,
        "load: plain DCP": disk.dcp_load,
    }  # fmt: skip
    if "safetensors" not in skipped:
        found |= {"save: safetensors": disk.safetensors_save, "load: safetensors": disk.safetensors_load}
    return found


def run(options: Options) -> Report:
    width, rounds = (64 if options.quick else 1184), options.rounds_or(ROUNDS)
    report = Report("checkpoint", {"rounds": rounds, "threads": torch.get_num_threads()}, missing(PEERS))
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said of one process
        disk = Disk(Path(folder), state_of(width))
        samples = interleave([System(name, turn) for name, turn in systems_of(disk, report.skipped).items()], rounds)
        assert all(torch.equal(t, disk.state[name]) for name, t in disk.target.items()), "what was loaded is not what was saved"
        seconds = resharded(Path(folder), width, rounds)
    report.samples["one process"] = samples
    conclude(report, samples, seconds, disk.size)
    return report


def conclude(report: Report, samples: dict[str, list[Times]], seconds: dict[str, list[float]], size: int) -> None:
    rows, figures = [], {}
    for name in samples:
        limit = WRITE if name.startswith("save") or name == WRITE else READ
        wall, cpu = spread(t.wall for t in samples[name]), spread(t.cpu for t in samples[name])
        ratio = paired_ratio(samples, name, limit, "wall")
        figures[name] = {"gb_per_second": size / wall.median / 1e9, "wall_over_limit": ratio._asdict(), "cpu_seconds": cpu.median}
        rows.append([name, f"{size / wall.median / 1e9:.2f}", f"{size / wall.high / 1e9:.2f}-{size / wall.low / 1e9:.2f}",
                     f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})", f"{cpu.median:.3f}"])  # fmt: skip
    layouts = [
        [name, f"{size / s.median / 1e9:.2f}", f"{size / s.high / 1e9:.2f}-{size / s.low / 1e9:.2f}"]
        for name, s in ((name, spread(values)) for name, values in seconds.items())
    ]
    report.figures = {"bytes": size, "systems": figures, "layouts_seconds": seconds}
    report.tables = [
        f"{size / 1e6:.0f} MB\n" + table(["", "GB/s median", "quartiles", "wall / raw", "cpu s"], rows),
        "two gloo ranks, GB/s of the whole state\n" + table(["", "median", "quartiles"], layouts),
    ]


# ---------------------------------------------------------------- two ranks


def resharded(folder: Path, width: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a save and of each load, by rank 0 between barriers."""
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    ranks = [context.Process(target=_rank, args=(rank, str(folder), width, rounds, queue)) for rank in range(2)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join()
    assert all(rank.exitcode == 0 for rank in ranks), f"ranks ended with {[rank.exitcode for rank in ranks]}; what went wrong is above"
    return queue.get()


def _rank(rank: int, folder: str, width: int, rounds: int, queue) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    state = {name: distribute_tensor(t, mesh, [Shard(0)]) for name, t in state_of(width).items()}
    targets = {kind: {n: zeros(t.shape, device_mesh=mesh, placements=[place]) for n, t in state.items()} for kind, place in LAYOUTS.items()}
    manager = CheckpointManager(f"{folder}/ranks", keep_last=1)
    seconds: dict[str, list[float]] = {"save": []} | {f"load, {kind}": [] for kind in LAYOUTS}
    for i in range(rounds + 1):
        found = {"save": _timed(lambda: manager.save(i + 1, state, {}))}
        path = f"{folder}/ranks/iter_{i + 1:07d}"
        for kind, target in targets.items():
            found[f"load, {kind}"] = _timed(partial(load_tensors, path, target))
        for name, value in found.items():
            if i:  # the first round is a warm-up
                seconds[name].append(value)
    name = next(iter(state))
    assert all(_equal(state[name], target[name]) for target in targets.values()), "what was loaded is not what was saved"
    if rank == 0:
        queue.put(seconds)
    end_groups()


def _equal(a: DTensor, b: DTensor) -> bool:
    return torch.equal(a.full_tensor(), b.full_tensor())


def _timed(work: Callable[[], object]) -> float:
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start
