"""The kernels in CUDA C++ without a GPU: what nvcc makes of them, and what they do when their copies and signals are those of a CPU."""

import ctypes
import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch

from megatron_moe.kernels.cuda import build
from megatron_moe.kernels.fused import cuda_exchange
from megatron_moe.kernels.fused.cuda_exchange import CudaKernels

HERE, SOURCES = Path(__file__).resolve().parent, sorted(build.HERE.glob("*.cu"))
needs_nvcc = pytest.mark.skipif(build.nvcc() is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


# ---------------------------------------------------------------- compiled


@needs_nvcc
@pytest.mark.parametrize("architecture", ["90", "90a", "100"])
@pytest.mark.parametrize("source", SOURCES, ids=lambda f: f.name)
def test_nvcc_compiles_without_stack_or_spills(source, architecture, tmp_path):
    command = build.compile_command(source, tmp_path / "out.cubin", (9, 0), "-cubin", "-Xptxas", "-v")
    command = [re.sub(r"compute_90,code=sm_90", f"compute_{architecture},code=sm_{architecture}", word) for word in command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr
    stacks = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(stacks) == 4 and set(stacks) == {("0", "0", "0")}  # send, and gather_sum for three types
    assert all(int(n) <= 128 for n in re.findall(r"Used (\d+) registers", done.stderr))


@needs_nvcc
def test_rows_are_moved_by_bulk_copies_and_signals_are_of_the_system(tmp_path):
    output = tmp_path / "out.ptx"
    subprocess.run(build.compile_command(SOURCES[0], output, (9, 0), "-ptx"), check=True, capture_output=True)
    ptx = output.read_text()
    for pattern in (
        r"cp\.async\.bulk\.shared::cluster\.global\.mbarrier", r"cp\.async\.bulk\.global\.shared::cta\.bulk_group", r"st\.release\.sys",
        r"ld\.acquire\.sys", r"atom\.acq_rel\.sys", r"st\.global\.v4",
    ):  # fmt: skip
        assert re.search(pattern, ptx), pattern


@needs_nvcc
def test_a_library_is_made_once_and_again_when_its_source_changes(tmp_path, caplog):
    folder, sources = tmp_path / "cache", tmp_path / "sources"
    shutil.copytree(build.HERE, sources)
    with caplog.at_level("INFO", logger="megatron_moe"):
        first = build.built(sources / "exchange.cu", (9, 0), folder)
        assert build.built(sources / "exchange.cu", (9, 0), folder) == first
    assert len([r for r in caplog.records if "compiled by nvcc" in r.message]) == 1
    assert {f.suffix for f in folder.iterdir()} == {".so", ".lock"}  # nothing half made
    library = ctypes.CDLL(str(first))
    assert library.moe_send and library.moe_gather_sum
    with open(sources / "bulk.cuh", "a") as file:
        file.write("// changed\n")
    assert build.built(sources / "exchange.cu", (9, 0), folder) != first
    (sources / "exchange.cu").write_text("this is not C++")
    with pytest.raises(RuntimeError, match=r"nvcc could not compile exchange\.cu"):
        build.built(sources / "exchange.cu", (9, 0), folder)


def test_what_cannot_be_says_why(monkeypatch):
    assert "9.0" in cuda_exchange.problem((8, 0), 64, torch.bfloat16, 2)
    assert "float64" in cuda_exchange.problem((9, 0), 64, torch.float64, 2)
    assert "16384 x 4" in cuda_exchange.problem((9, 0), 16384, torch.float32, 2)
    assert "1000 experts" in cuda_exchange.problem((9, 0), 64, torch.float32, 1000)
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert "nvcc" in cuda_exchange.problem((9, 0), 64, torch.bfloat16, 2)


def test_the_flag_asks_for_these_kernels_and_says_why_there_are_none(monkeypatch):
    from megatron_moe.parallel import fused

    device, made = torch.device("cuda", 0), object()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(build, "nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_exchange, "kernels_for", lambda _: made)
    assert fused._cuda_kernels(device, 64, torch.bfloat16, 2) is made
    assert "leave it out" in fused._cuda_kernels(device, 64, torch.float64, 2)

    def fails(_):
        raise RuntimeError("nvcc could not compile")

    monkeypatch.setattr(cuda_exchange, "kernels_for", fails)
    assert "nvcc could not compile" in fused._cuda_kernels(device, 64, torch.bfloat16, 2)


def test_the_sources_are_installed_with_the_package():
    said = (HERE.parents[1] / "pyproject.toml").read_text()
    assert '"megatron_moe.kernels.cuda" = ["*.cu", "*.cuh"]' in said


# ---------------------------------------------------------------- on a CPU


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    """exchange.cu itself, with the functions of cuda_on_cpu.h in the place of those of bulk.cuh."""
    output = tmp_path_factory.mktemp("cpu") / "exchange.so"
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", "-x", "c++", '-DPRIMITIVES="cuda_on_cpu.h"', f"-I{HERE}"]
    subprocess.run([*command, "-o", str(output), str(build.HERE / "exchange.cu")], check=True, env=os.environ | {"LC_ALL": "C"})
    return CudaKernels(ctypes.CDLL(str(output)), 2)


class Ranks:
    """Buffers of ranks that are threads of this process, and maps of random tokens as `Exchange.plan` would make them."""

    def __init__(self, tokens, K, H, dtype, seed=0):
        experts_here = max(K, 2)
        generator = torch.Generator().manual_seed(seed)
        self.world, self.K, self.H, self.dtype = len(tokens), K, H, dtype
        self.x = [torch.randn(T, H, generator=generator).to(dtype) for T in tokens]
        self.weights = [torch.rand(T, K, generator=generator) for T in tokens]
        self.owner, self.row, self.choice, used = [], [], [], [0] * self.world
        for T in tokens:
            expert = torch.rand(T, self.world * experts_here, generator=generator).argsort(1)[:, :K]
            expert = torch.where(torch.rand(T, K, generator=generator) < 0.2, self.world * experts_here, expert)
            expert, choice = expert.sort(1)  # those of nobody last
            owner = torch.where(expert < self.world * experts_here, expert // experts_here, -1)
            row = torch.zeros_like(owner)
            for t in range(T):
                for j in range(K):
                    if (rank := int(owner[t, j])) >= 0:
                        row[t, j], used[rank] = used[rank], used[rank] + 1
            for name, values in (("owner", owner), ("row", row), ("choice", choice)):
                getattr(self, name).append(values.to(torch.int32).contiguous())
        self.rows = [torch.full((max(n, 1), H), 7.0).to(dtype) for n in used]
        self.scalars = [torch.full((max(n, 1),), 7.0) for n in used]
        self.signals = [torch.zeros(4, self.world, dtype=torch.int32) for _ in tokens]
        self.state = [[torch.zeros(n, dtype=torch.int32) for n in (4, 1, 1)] for _ in tokens]  # epochs, error, ticket

    def table(self, tensors):
        return torch.tensor([t.data_ptr() for t in tensors])

    def maps(self, rank):
        return self.owner[rank], self.row[rank], self.choice[rank]

    def send(self, kernels, rank, has_weights=True, spins=2**40):
        kernels.send_kernel[(1,)](
            self.x[rank], self.weights[rank], *self.maps(rank), *map(self.table, (self.rows, self.scalars, self.signals)), *self.state[rank],
            rank, spins, len(self.x[rank]), K=self.K, WORLD=self.world, HAS_W=has_weights, H=self.H,
        )  # fmt: skip

    def gather_sum(self, kernels, rank, has_scalars=True):
        out, scalars = torch.full((len(self.x[rank]), self.H), 9.0).to(self.dtype), torch.zeros(len(self.x[rank]), self.K)
        kernels.gather_sum_kernel[(1, 1)](
            *map(self.table, (self.rows, self.scalars)), *self.maps(rank), out, scalars, len(out), K=self.K, HAS_S=has_scalars, H=self.H
        )
        return out, scalars

    def everyone(self, work):
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()


SHAPES = [  # tokens of each rank, K, H, dtype; 2 blocks of 8 warps: more than 96 tokens fill every slot again
    ([150], 3, 12, torch.float32),
    ([21, 110], 2, 1104, torch.bfloat16),  # two pieces, the second one short
    ([5, 0, 33], 4, 520, torch.float16),
]
IDS = ["one rank", "two pieces", "a rank without tokens"]


@needs_compiler
@pytest.mark.parametrize(("tokens", "K", "H", "dtype"), SHAPES, ids=IDS)
def test_every_row_lies_where_the_map_says_and_everyone_has_met(kernels, tokens, K, H, dtype):
    ranks = Ranks(tokens, K, H, dtype)
    for _ in range(2):
        ranks.everyone(lambda rank: ranks.send(kernels, rank))
    for rank in range(ranks.world):
        for t, j in torch.cartesian_prod(torch.arange(tokens[rank]), torch.arange(K)).tolist():
            if (owner := int(ranks.owner[rank][t, j])) >= 0:
                row = int(ranks.row[rank][t, j])
                assert torch.equal(ranks.rows[owner][row], ranks.x[rank][t])
                assert ranks.scalars[owner][row] == ranks.weights[rank][t, ranks.choice[rank][t, j]]
        epochs, error, ticket = ranks.state[rank]
        assert (epochs.tolist(), int(error), int(ticket)) == ([0, 2, 0, 0], 0, 0)
        assert ranks.signals[rank].tolist() == [[0] * ranks.world, [2] * ranks.world, *[[0] * ranks.world] * 2]


@needs_compiler
@pytest.mark.parametrize(("tokens", "K", "H", "dtype"), SHAPES, ids=IDS)
def test_sums_are_those_of_the_canonical_order_bit_for_bit(kernels, tokens, K, H, dtype):
    ranks = Ranks(tokens, K, H, dtype)
    for rank, rows in enumerate(ranks.rows):
        rows.copy_(torch.randn(rows.shape, generator=torch.Generator().manual_seed(rank)))
        ranks.scalars[rank].copy_(torch.arange(len(rows)) + 100.0 * rank)
    for rank in range(ranks.world):
        out, scalars = ranks.gather_sum(kernels, rank)
        assert torch.equal(ranks.gather_sum(kernels, rank, has_scalars=False)[0], out)
        for t in range(tokens[rank]):
            parts, there = {}, {}
            for owner, row, choice in zip(*(m[t].tolist() for m in ranks.maps(rank))):
                if owner >= 0:
                    parts.setdefault(owner, []).append(ranks.rows[owner][row].float())
                    there[choice] = float(ranks.scalars[owner][row])
            total = torch.zeros(H)
            for owner in sorted(parts):
                of_rank = torch.zeros(H)
                for part in parts[owner]:
                    of_rank = of_rank + part
                total = total + of_rank
            assert torch.equal(out[t], total.to(dtype))
            assert scalars[t].tolist() == [there.get(choice, 0.0) for choice in range(K)]


@needs_compiler
def test_rows_without_weights_leave_the_weights_alone(kernels):
    ranks = Ranks([9], 2, 8, torch.float32)
    ranks.send(kernels, 0, has_weights=False)
    assert (ranks.scalars[0] == 7.0).all()
    assert (ranks.rows[0] != 7.0).all()


@needs_compiler
def test_a_rank_that_does_not_come_is_named_and_not_waited_for_again(kernels):
    ranks = Ranks([4, 4], 2, 8, torch.float32)
    for epoch in (1, 2):
        ranks.send(kernels, 0, spins=1000)
        epochs, error, _ = ranks.state[0]
        assert (epochs.tolist(), int(error)) == ([0, epoch, 0, 0], 1 + 1 * 2 + 1)  # channel `sent`, rank 1


@needs_compiler
def test_rows_that_do_not_fit_are_an_error(kernels):
    ranks = Ranks([1], 1, 16384, torch.float32)
    with pytest.raises(RuntimeError, match="do not fit"):
        ranks.send(kernels, 0)
