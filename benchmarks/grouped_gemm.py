"""experts' matrix products on one GPU: TFLOP/s of grouped_mm by alignment, of the gathering kernel, of row-wise FP8

One product of a layer, R = T K rows of D values by E matrices [D, F], forward, for the gradient of the rows and for that of the matrices. The
limit is one dense product of as many operations. Rows per expert are uneven (from half to one and a half of the mean), and multiples of
`align`. Of the gathering kernel's work the copy of the rows is a part, so beside it stands grouped_mm with that copy; FP8 is given with the
quantisation of its operands and without. Each row: median and quartiles over rounds, in which the systems take turns.
"""
# T tokens, K experts per token, R rows, D hidden, F inner width, E experts

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.harness import Options, Report, say, spread, table
from megatron_moe.kernels import fp8
from megatron_moe.kernels.grouped_gemm import grouped_gemm, row_gradient, weight_gradient
from megatron_moe.utils.compat import scaled_grouped_mm

PEERS: dict[str, str] = {}

# T, D, F, E, K: shapes of one-GPU MoE layers for which figures are published (SonicMoE, figure 14)
SHAPES = ((24576, 1536, 256, 128, 8), (24576, 1536, 1024, 32, 2), (32768, 4096, 1024, 64, 4), (32768, 4096, 2048, 64, 4))
ALIGNMENTS = (1, 8, 128)
NO_GPU = "torch sees no GPU here, and a CPU's products say nothing about a GPU's"

Systems = dict[str, Callable[[], object]]


def run(options: Options) -> Report:
    shapes, rounds = (((512, 256, 128, 8, 2),), options.rounds_or(3)) if options.quick else (SHAPES, options.rounds_or(20))
    report = Report("grouped_gemm", {"shapes T,D,F,E,K": shapes, "align": ALIGNMENTS, "rounds": rounds, "dtype": "bfloat16"})
    if not torch.cuda.is_available():
        report.skipped["everything"] = NO_GPU
        return report
    capability = torch.cuda.get_device_capability()
    report.parameters["device"] = torch.cuda.get_device_name()
    if reasons := fp8.gpu_problems(capability, torch.bfloat16, (16, 16)):
        report.skipped["fp8"] = "; ".join(reasons)
    for shape in shapes:
        say(f"T, D, F, E, K = {shape}")
        systems = systems_of(shape, torch.device("cuda"), has_fp8=not reasons)
        operations = 2 * shape[0] * shape[4] * shape[1] * shape[2]
        report.figures[",".join(map(str, shape))] = rates = speed(systems, operations, rounds)
        rows = [[name, f"{r['us']:.0f}", f"{r['low']:.0f} to {r['high']:.0f}", f"{r['TFLOP/s']:.0f}"] for name, r in rates.items()]
        report.tables.append(f"T, D, F, E, K = {shape}\n" + table(["", "us", "quartiles", "TFLOP/s"], rows))
    return report


def systems_of(shape: tuple[int, int, int, int, int], device: torch.device, has_fp8: bool) -> Systems:
    """What is compared, each a call that makes one product."""
    T, D, F, E, K = shape
    R = T * K
    x_TD, dy_RF = (torch.randn(n, device=device, dtype=torch.bfloat16) for n in ((T, D), (R, F)))
    w_EDF = torch.randn(E, D, F, device=device, dtype=torch.bfloat16)
    token_R = torch.randint(0, T, (R,), device=device)
    x_RD = x_TD.index_select(0, token_R)
    wide_DF = w_EDF[0].contiguous()
    systems: Systems = {"one dense product": lambda: x_RD @ wide_DF}
    for align in ALIGNMENTS:
        offsets_E = offsets_of(R, E, align).to(device)
        systems |= _grouped(f", align {align}", x_RD, w_EDF, dy_RF, offsets_E)
    offsets_E = offsets_of(R, E, 1).to(device)
    systems["copy and grouped_mm"] = lambda: grouped_gemm(x_TD.index_select(0, token_R), w_EDF, offsets_E)
    if device.type == "cuda":
        systems |= _gathering(x_TD, token_R, w_EDF, dy_RF, offsets_E)
    if has_fp8:
        systems |= _fp8(x_RD, w_EDF, offsets_of(R, E, 16).to(device))
    return systems


def _grouped(title: str, x_RD: Tensor, w_EDF: Tensor, dy_RF: Tensor, offsets_E: Tensor) -> Systems:
    return {
        f"grouped_mm{title}": lambda: grouped_gemm(x_RD, w_EDF, offsets_E),
        f"gradient of rows{title}": lambda: row_gradient(dy_RF, w_EDF, offsets_E, False, False),
        f"gradient of matrices{title}": lambda: weight_gradient(x_RD, dy_RF, offsets_E, w_EDF, False),
    }


def _gathering(x_TD: Tensor, token_R: Tensor, w_EDF: Tensor, dy_RF: Tensor, offsets_E: Tensor) -> Systems:
    from megatron_moe.kernels import triton_gemm

    return {
        "gathering kernel": lambda: triton_gemm.product(x_TD, token_R, w_EDF, offsets_E),
        "gathering kernel, gradient of matrices": lambda: triton_gemm.outer(x_TD, token_R, dy_RF, offsets_E),
    }


def _fp8(x_RD: Tensor, w_EDF: Tensor, offsets_E: Tensor) -> Systems:
    x, w = fp8.quantise_rows(x_RD), fp8.quantise_matrices(w_EDF)
    return {
        "fp8, quantised before": lambda: scaled_grouped_mm(x[0], w[0], x[1], w[1], offsets_E),
        "fp8 with quantisation": lambda: fp8.fp8_grouped_gemm(x_RD, w_EDF, offsets_E),
    }


def offsets_of(rows: int, experts: int, align: int) -> Tensor:
    """int32 [E]: ends of uneven groups of multiples of `align`, `rows` rows in all but for what that leaves over."""
    generator = torch.Generator().manual_seed(0)
    share_E = 0.5 + torch.rand(experts, generator=generator, dtype=torch.float64)
    groups_E = (share_E / share_E.sum() * (rows // align)).long()
    groups_E[-1] += rows // align - groups_E.sum()
    return (groups_E * align).cumsum(0).to(torch.int32)


def speed(systems: Systems, operations: int, rounds: int) -> dict[str, dict[str, float]]:
    """By turns, on events of the device: microseconds and TFLOP/s."""
    times: dict[str, list[float]] = {name: [] for name in systems}
    for work in systems.values():
        work()  # compiles, and finds its memory
    torch.cuda.synchronize()
    names = list(systems)
    for number in range(rounds):
        for name in [*names[number % len(names) :], *names[: number % len(names)]]:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            systems[name]()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3)
    found = {name: spread(values) for name, values in times.items()}
    return {name: {"us": s.median, "low": s.low, "high": s.high, "TFLOP/s": operations / s.median / 1e6} for name, s in found.items()}
