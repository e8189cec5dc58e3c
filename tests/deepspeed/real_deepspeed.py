"""A run of the real DeepSpeed on CPUs, in a process of its own: trains small_moe.py, saves, and trains on.

    torchrun --nproc-per-node 2 real_deepspeed.py JOB.json

JOB: out, ep_size, stage, half, steps (before saving), more (after), load (a folder to begin from, or null).
OUT/checkpoint is what DeepSpeed has saved; OUT/rank_R.pt says losses and weights at the saving and at the end.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
os.environ["DS_ACCELERATOR"] = "cpu"

import deepspeed
import small_moe
import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    deepspeed.init_distributed(dist_backend="gloo")
    rank = dist.get_rank()
    model = small_moe.Small(MoE, job["ep_size"])
    global_names = {name: renumbered(name, rank % job["ep_size"], job["ep_size"]) for name in model.state_dict()}
    whole = small_moe.start_weights(small_moe.Small(MoE, 1))
    model.load_state_dict({name: whole[there] for name, there in global_names.items()})
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, None: torch.float32}[job["half"]]
    groups = split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "all"})
    optimizer = torch.optim.AdamW([g | {"lr": small_moe.OPTIMIZER["lr"]} for g in groups], **small_moe.OPTIMIZER)
    config = small_moe.config(job["stage"], job["half"]) | {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    out = Path(job["out"])
    if job["load"]:
        path, client_state = engine.load_checkpoint(job["load"])
        assert path is not None
    losses = small_moe.train(engine, 0, job["steps"], rank, dtype)
    weights = {global_names[n]: t.detach().clone() for n, t in engine.module.state_dict().items()}
    engine.save_checkpoint(str(out / "checkpoint"), client_state={"note": "mine", "seen": [1, 2.5]})
    more = small_moe.train(engine, job["steps"], job["steps"] + job["more"], rank, dtype)
    after = {global_names[n]: t.detach().clone() for n, t in engine.module.state_dict().items()}
    torch.save({"losses": losses, "weights": weights, "more": more, "after": after}, out / f"rank_{rank}.pt")


def renumbered(name: str, rank: int, ep_size: int) -> str:
    """A name with a rank's own number of an expert -> with the number over all ranks."""
    head, found, tail = name.partition("deepspeed_experts.")
    if not found:
        return name
    number, _, rest = tail.partition(".")
    each = (4 if head.startswith("one") else 8) // ep_size
    return f"{head}{found}{int(number) + rank * each}.{rest}"


if __name__ == "__main__":
    main()
