"""A small model in two spellings, and the definition of right for an engine: a plain PyTorch loop in one process.

`Net(plain=True)` has nothing of ours in it: its MoE layer is ten lines below. Both spellings have the same names in their state dict.
`plain_run` walks the micro-batches of all ranks in turn, and takes the mean of their losses; `engine_run` trains on every rank of a pool.
Both return the losses, the norm and the gradients of each step, and the weights after the last.
"""
# B samples, D width, E experts, K experts per sample

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe import deepspeed
from megatron_moe.checkpoint.files import CheckpointError
from megatron_moe.deepspeed.moe.layer import MoE

IN, D, OUT, E, MICRO, STEPS = 6, 12, 5, 8, 3, 4
AUX = 0.05


class PlainMoE(nn.Module):
    """Softmax of the gate; the K best experts, weighted by it (over their sum for K above 1). The balance loss counts first choices."""

    def __init__(self, width: int, experts: list[nn.Module], k: int, residual: nn.Module | None):
        super().__init__()
        self.k = k
        self.deepspeed_moe = nn.Module()
        self.deepspeed_moe.gate, self.deepspeed_moe.experts = nn.Module(), nn.Module()
        self.deepspeed_moe.gate.wg = nn.Linear(width, len(experts), bias=False)
        self.deepspeed_moe.experts.deepspeed_experts = nn.ModuleList(experts)
        self.mlp = residual
        self.coefficient = None if residual is None else nn.Linear(width, 2)

    def forward(self, x_BD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gates_BE = self.deepspeed_moe.gate.wg(x_BD).softmax(-1)
        weights_BK, ids_BK = gates_BE.topk(self.k)
        if self.k > 1:
            weights_BK = weights_BK / weights_BK.sum(-1, keepdim=True)
        experts = self.deepspeed_moe.experts.deepspeed_experts
        y_BD = torch.stack([sum(w * experts[i](x) for w, i in zip(ws, ids)) for x, ws, ids in zip(x_BD, weights_BK, ids_BK.tolist())])
        first_BE = F.one_hot(ids_BK[:, 0], len(experts)).to(gates_BE.dtype)
        l_aux = len(experts) * (gates_BE.mean(0) * first_BE.mean(0)).sum()
        if self.mlp is not None:
            c_B2 = self.coefficient(x_BD).softmax(-1)
            y_BD = y_BD * c_B2[:, :1] + self.mlp(x_BD) * c_B2[:, 1:]
        return y_BD, l_aux, F.one_hot(ids_BK, len(experts)).sum((0, 1))


def expert() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 10), nn.Tanh(), nn.Linear(10, D))


class Block(nn.Module):
    """What a unit of its own is made of."""

    def __init__(self):
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.inner(self.norm(x)))


class Net(nn.Module):
    def __init__(self, plain: bool = False, k: int = 1, residual: bool = False, ep_size: int = 1):
        super().__init__()
        self.first = nn.Linear(IN, D)
        self.blocks = nn.ModuleList(Block() for _ in range(2))
        if plain:
            self.moe: nn.Module = PlainMoE(D, [expert() for _ in range(E)], k, expert() if residual else None)
        else:
            self.moe = MoE(D, expert(), E, ep_size, k, drop_tokens=False, use_residual=residual, top2_2nd_expert_sampling=False)
        self.last = nn.Linear(D, OUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        y, l_aux, _ = self.moe(x)
        return self.last(x + y), l_aux


def plain_net(dtype: torch.dtype = torch.float64, **kind: Any) -> Net:
    """With weights of a fixed seed, and gates that are far apart: near-ties would be decided by rounding."""
    with torch.random.fork_rng([]):
        torch.manual_seed(3)
        net = Net(plain=True, **kind)
        with torch.no_grad():
            for p in net.parameters():
                p.copy_(torch.randn_like(p) * 0.4)
            net.moe.deepspeed_moe.gate.wg.weight.mul_(4)
    return net.to(dtype)


def our_net(dtype: torch.dtype = torch.float64, ep_size: int = 1, **kind: Any) -> Net:
    """The same weights, by state dict."""
    net = Net(ep_size=ep_size, **kind).to(dtype)
    net.load_state_dict(plain_net(dtype, **kind).state_dict())
    return net


def batch(step: int, micro: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Other samples for every rank, micro-batch and step."""
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    return torch.randn(MICRO, IN, generator=generator, dtype=torch.float64).to(dtype), torch.randint(OUT, (MICRO,), generator=generator)


def loss_of(net: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    logits, l_aux = net(x)
    return F.cross_entropy(logits, target) + AUX * l_aux


# ---------------------------------------------------------------- two ways to train it


def adam(parameters: Any) -> torch.optim.Optimizer:
    # eps: with 1e-8 Adam makes full steps of the rounding noise of gradients that are next to nothing
    return torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5, weight_decay=0.1)


ADAM = {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-5, "weight_decay": 0.1}}


def plain_run(
    ranks: int, accumulation: int, clip: float = 0.3, dtype: torch.dtype = torch.float64, make: Any = adam, **kind: Any
) -> dict[str, Tensor]:
    net = plain_net(dtype, **kind)
    optimizer = make(net.parameters()) if make is adam else make(net)
    out: dict[str, Tensor] = {}
    for step in range(STEPS):
        for micro in range(accumulation):
            losses = [loss_of(net, *batch(step, micro, rank, dtype)) for rank in range(ranks)]
            out |= {f"loss {step} {micro} {rank}": loss.detach() for rank, loss in enumerate(losses)}
            (sum(losses) / (ranks * accumulation)).backward()
        out |= {f"gradient {step} {n}": torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in net.named_parameters()}
        for p in net.parameters():
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad  # an expert without tokens has a gradient of zero
        norm = torch.cat([p.grad.flatten() for p in net.parameters()]).norm()
        out[f"norm {step}"] = norm
        for p in net.parameters():
            p.grad *= min(1.0, clip / (norm + 1e-6)) if clip else 1.0
        optimizer.step()
        optimizer.zero_grad()
    return out | {f"weight {n}": p.detach().clone() for n, p in net.named_parameters()}


def config_of(ranks: int, accumulation: int, stage: int, **sections: Any) -> dict[str, Any]:
    return {
        "train_batch_size": MICRO * ranks * accumulation, "train_micro_batch_size_per_gpu": MICRO, "gradient_clipping": 0.3,
        "zero_optimization": {"stage": stage}, **sections,
    }  # fmt: skip


def engine_run(
    config: dict[str, Any], ep_size: int, dtype: torch.dtype = torch.float64, make: Any = None, **kind: Any
) -> dict[str, Tensor] | None:
    net = our_net(dtype, ep_size, **kind)
    optimizer = make(net) if make else None
    engine, *_ = deepspeed.initialize(model=net, optimizer=optimizer, config=copy.deepcopy(config))
    out = train(engine, range(STEPS), dtype)
    out |= {f"weight {n}": whole(t) for n, t in engine.module_state_dict().items()}
    return out if dist.get_rank() == 0 else None


def train(engine: deepspeed.DeepSpeedEngine, steps: Any, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Losses of all ranks, gradients and norm of every step."""
    out: dict[str, Tensor] = {}
    for step in steps:
        for micro in range(engine.gradient_accumulation_steps()):
            loss = loss_of(engine, *batch(step, micro, dist.get_rank(), dtype))
            engine.backward(loss)
            out |= {f"loss {step} {micro} {rank}": value for rank, value in enumerate(of_all_ranks(loss.detach()))}
            if engine.is_gradient_accumulation_boundary():
                out |= {f"gradient {step} {n}": g for n, g in gradients(engine.module).items()}
            engine.step()
        out[f"norm {step}"] = torch.tensor(engine.get_global_grad_norm(), dtype=dtype)
    return out


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Whole, under the names of the state dict."""
    found = {}
    for name, p in module.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        prefix, is_stack, own = name.partition("core.experts.stack.")
        if is_stack:
            found |= {f"{prefix}deepspeed_moe.experts.deepspeed_experts.{e}.{own}": g for e, g in enumerate(whole(grad).unbind())}
        else:
            found[name.replace("core.gate.weight", "deepspeed_moe.gate.wg.weight")] = whole(grad)
    return found


def whole(t: Tensor) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def of_all_ranks(x: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, x)
    return parts


def check(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys(), sorted(found.keys() ^ expected.keys())
    errors = {
        n: float((t.double() - expected[n].double()).abs().max() / max(float(expected[n].abs().max()), 1e-3)) for n, t in found.items()
    }
    name, error = max(errors.items(), key=lambda item: item[1])
    assert error < tolerance, f"{name} is off by {error:.1e} of its largest element"


def said(mistake: Any, *args: Any) -> str:
    """What a call is refused with, in a worker that lives on: an exception that leaves it would end its pool."""
    try:
        mistake(*args)
    except (ValueError, AssertionError, CheckpointError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
