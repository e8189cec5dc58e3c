"""Machines by name, and where their figures come from. Everything can be overridden by flags."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machine:
    """Of one device. Bandwidths in GB/s, one direction, to devices of the same node and of others; memory in GB (10^9)."""

    name: str
    memory_gb: float
    peak_tflops: float  # dense matrix products in bf16
    memory_bandwidth: float
    intra_node_bandwidth: float
    inter_node_bandwidth: float
    devices_per_node: int
    source: str

    @property
    def is_cpu(self) -> bool:
        return self.name == "cpu"


_DGX = "inter-node: one 400 Gb/s adapter per device (DGX H100 user guide)"
MACHINES = {
    m.name: m
    for m in (
        Machine("h100-sxm", 80, 989, 3350, 450, 50, 8,
                f"H100 SXM data sheet: 989 TFLOP/s bf16 dense, 3.35 TB/s, 80 GB, NVLink 900 GB/s both ways together; {_DGX}"),
        Machine("h200-sxm", 141, 989, 4800, 450, 50, 8,
                f"H200 SXM data sheet: 989 TFLOP/s bf16 dense, 4.8 TB/s, 141 GB, NVLink 900 GB/s both ways together; {_DGX}"),
        Machine("a100-80gb", 80, 312, 2039, 300, 25, 8,
                "A100 80GB SXM data sheet: 312 TFLOP/s bf16 dense, 2039 GB/s, NVLink 600 GB/s both ways together; inter-node: one 200 Gb/s "
                "adapter per device (DGX A100 user guide)"),
        Machine("a100-40gb", 40, 312, 1555, 300, 25, 8,
                "A100 40GB SXM data sheet: 312 TFLOP/s bf16 dense, 1555 GB/s, NVLink 600 GB/s both ways together; inter-node as a100-80gb"),
        Machine("cpu", 8, 0.1, 10, 2, 1, 64,
                "one core of the machine of docs/performance.md: 0.083 TFLOP/s of products in float32 were measured there, which 0.1 times "
                "the default efficiency comes near; its memory and bandwidths are round numbers for gloo on one host"),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Each has a flag and a reason (docs/planning.md)."""

    matmul_efficiency: float = 0.65
    attention_efficiency: float = 0.35
    network_efficiency: float = 0.8
    memory_efficiency: float = 0.8
    collective_latency_us: float = 20.0
    launch_us: float = 5.0
    host_wait_us: float = 100.0
    load_skew: float = 1.3
    memory_reserve: float = 0.1


# Where the default of each comes from. Nothing here was measured by us: no GPU was at hand.
SOURCES = {
    "matmul_efficiency": "assumed: large bf16 products reach 600 to 750 of the 989 TFLOP/s of an H100 under its power limit",
    "attention_efficiency": "published: FlashAttention-2 on an H100 (arXiv 2407.08608)",
    "network_efficiency": "assumed; published for rows in a node: 380 of 450 GB/s (DeepEP), 153 to 158 of 160 on H800",
    "memory_efficiency": "assumed: streaming kernels against the data sheet",
    "collective_latency_us": "assumed: a small NCCL collective over a few nodes",
    "launch_us": "assumed: an operator of eager PyTorch",
    "host_wait_us": "assumed: between 50 and 200",
    "load_skew": "assumed: a router with a balance loss, early in training",
    "memory_reserve": "assumed: CUDA context, NCCL, fragmentation",
}
