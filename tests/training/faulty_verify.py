"""pretrain_gpt_moe.py with a fault in its layouts, the one that $FAULT names: also in the processes that --exit-after-verify starts,
which import this file as their main module. Started by test_verify_run.py; the product itself has no hooks for this.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pretrain_gpt_moe


def expert_gradients_doubled():
    from megatron_moe.training import step

    original = step.gradient_norm

    def gradient_norm(parameters, ranks):
        parameters = list(parameters)
        for p in parameters:
            if p.ndim == 3:  # a stack of matrices
                p.grad.mul_(2.0)
        return original(parameters, ranks)

    step.gradient_norm = gradient_norm


def sums_of_nodes_lost():
    from megatron_moe.moe.dispatch.hierarchical import HierarchicalDispatcher

    original = HierarchicalDispatcher.arrive_back
    HierarchicalDispatcher.arrive_back = lambda self, flight, plan: original(self, flight, plan) * 0.5


def in_the_first_step(fault):
    from megatron_moe.training.verify import layout

    original = layout.train_step

    def train_step(*args):
        if os.environ.get("RANK") == "1":
            fault()
        return original(*args)

    layout.train_step = train_step


def broken():
    raise OSError(5, "Input/output error")


FAULTS = {
    "none": lambda: None,
    "expert gradients doubled": expert_gradients_doubled,
    "sums of nodes lost": sums_of_nodes_lost,
    "raises": lambda: in_the_first_step(broken),
    "dies": lambda: in_the_first_step(lambda: os._exit(7)),
    "hangs": lambda: in_the_first_step(lambda: time.sleep(600)),
}

if "RANK" in os.environ or __name__ == "__mp_main__":
    FAULTS[os.environ["FAULT"]]()

if __name__ == "__main__":
    if os.environ["FAULT"] == "hangs":
        from megatron_moe.training.verify import folded

        folded.DEADLINE_SECONDS = 25.0
    pretrain_gpt_moe.main()
