"""torch.compile of a model, region by region. A graph break inside a region is an error, not a slow step.

The model's own Python is between the regions, and runs as it is written: FSDP gathers and frees parameters there (the router's
weight and the experts are FSDP units of their own), and tokens travel - the one place whose shapes depend on the data.
"""
# R rows of the experts here

from __future__ import annotations

import functools
import os
import shutil
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe.model.block import Block
from megatron_moe.model.gpt import GPT
from megatron_moe.model.mtp import MultiTokenModule
from megatron_moe.moe.dispatch import AllToAllDispatcher, OverlappedDispatcher, PaddedDispatcher
from megatron_moe.moe.dispatch.fused import FusedDispatcher
from megatron_moe.moe.experts import Experts
from megatron_moe.moe.layer import MoELayer

# One graph serves all layers of the same shapes; training and evaluation have one each.
REGIONS: dict[type[nn.Module], tuple[str, ...]] = {
    GPT: ("embed", "embed_ahead", "losses", "losses_of"),
    MultiTokenModule: ("merge",),
    Block: ("attend", "feed_forward", "normalise", "branch", "finish"),
    MoELayer: ("jittered", "decide"),
    Experts: ("forward",),
}


def apply_compile(model: GPT, backend: str = "inductor") -> None:
    """Replace the regions of every module by compiled ones. Names of modules and parameters stay."""
    # torch stops at 8 graphs of a function, and a pyramid needs two for each number of experts
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    for module in model.modules():
        for name in next((names for kind, names in REGIONS.items() if isinstance(module, kind)), ()):
            setattr(module, name, torch.compile(getattr(module, name), fullgraph=True, dynamic=False, backend=backend))
    for module in model.modules():
        if isinstance(module, MoELayer) and isinstance(module.experts, Experts) and _has_any_rows(module):
            module.experts.forward = of_any_rows(module.experts.forward)


def _has_any_rows(moe: MoELayer) -> bool:
    """Whether the number of the experts' rows depends on the routing: in training, or in evaluation alone, where a policy that keeps the
    capacity by itself has none, and the fused all-to-all asks for exact sizes."""
    is_padded_to_load = isinstance(moe.dispatcher, PaddedDispatcher) and (moe.policy.keeps_capacity or not moe.config.moe_token_dropping)
    return isinstance(moe.dispatcher, AllToAllDispatcher | OverlappedDispatcher | FusedDispatcher) or is_padded_to_load


def of_any_rows(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The experts' compiled forward for numbers of rows that change from step to step: one graph for all of them.

    torch makes graphs of their own for sizes 0 and 1, so fewer than two rows are filled up with zeros of weight zero, which go
    to the last expert and add nothing to anything.
    """

    @functools.wraps(forward)
    def padded(x_RD: Tensor, offsets_E: Tensor, row_weights_R: Tensor, has_spare_rows: bool) -> Tensor:
        rows = x_RD.shape[0]
        if missing := max(2 - rows, 0):
            x_RD, row_weights_R = F.pad(x_RD, (0, 0, 0, missing)), F.pad(row_weights_R, (0, missing))
            offsets_E = torch.cat([offsets_E[:-1], offsets_E[-1:] + missing])
        torch._dynamo.mark_dynamic(x_RD, 0)
        torch._dynamo.mark_dynamic(row_weights_R, 0)
        y_RD = forward(x_RD, offsets_E, row_weights_R, has_spare_rows)
        return y_RD[:rows].clone() if missing else y_RD  # no view: FSDP hooks what leaves the experts

    return padded


def compiler_problems(device_type: str) -> list[str]:
    """What keeps inductor from compiling here, instead of a traceback in the first step: on a CPU it writes C++, on a GPU Triton,
    whose launcher is C."""
    default = "clang++" if sys.platform == "darwin" else "g++"
    wanted, names = ("CC", ("gcc", "clang", "cc")) if device_type == "cuda" else ("CXX", (default,))
    given = os.environ.get(wanted)
    if any(map(shutil.which, [given] if given else names)):
        return []
    language = "C" if wanted == "CC" else "C++"
    return [
        f"--compile needs a {language} compiler, and {given or ' or '.join(names)} is not there; install one (Debian and Ubuntu: "
        f"apt-get install g++), set {wanted} to yours, or leave the flag out"
    ]
