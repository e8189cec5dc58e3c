"""deepspeed.moe.layer.MoE: a mixture of copies of any module, with DeepSpeed's arguments, defaults and answers.

    self.fc3 = MoE(hidden_size=84, expert=nn.Linear(84, 84), num_experts=8, k=1)
    ...
    x, l_aux, exp_counts = self.fc3(x)      # x of the same shape; loss = ce + 0.01 * l_aux

The layer below it is the product's own, moe/layer.py: what DeepSpeed calls drop_tokens, use_rts and so on are its flags. Here are the
arguments, Residual-MoE around the experts, and DeepSpeed's names in the state dict (names.py). Where the two differ on purpose, the
table in docs/moe.md says how.
"""
# B ... any leading dims, T tokens (their product), D hidden, E experts

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe import mpu
from megatron_moe.config.model import divisors
from megatron_moe.config.moe import MoEConfig
from megatron_moe.deepspeed.moe.names import speak_deepspeed
from megatron_moe.deepspeed.utils import groups
from megatron_moe.moe.layer import MoELayer
from megatron_moe.moe.module_experts import output_of
from megatron_moe.moe.tokens import TokenInfo
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.expert import reducer_over, split_experts
from megatron_moe.utils.random import drawn_keys


class MoE(nn.Module):
    """(hidden_states, used_token) -> (output, l_aux, exp_counts).

    output      shape and dtype of hidden_states; with use_residual c_0 experts(x) + c_1 mlp(x), c = softmax(coefficient(x))
    l_aux       scalar: the balance loss of the tokens here, 1 when balanced; yours to weigh and to add to the loss
    exp_counts  int64 [E]: tokens here that chose each expert, before any is dropped

    `expert` is copied: all experts start as it is, like DeepSpeed's. With identical_experts=False each draws weights of its own, by the
    reset_parameters of its modules: not the default, because it would overwrite what a caller has put there. With use_residual the
    module itself becomes `mlp`, a dense one.

    `ep_size` above 1, else the degree of groups.initialize, else 1. All experts are here until `parallelise_`, which
    deepspeed.initialize calls; one process needs neither.

    Noise and random token selection take one number per forward from torch's generator, in training alone.
    """

    def __init__(
        self, hidden_size: int, expert: nn.Module, num_experts: int = 1, ep_size: int | None = 1, k: int = 1, capacity_factor: float = 1.0,
        eval_capacity_factor: float = 1.0, min_capacity: int = 4, use_residual: bool = False, noisy_gate_policy: str | None = None,
        drop_tokens: bool = True, use_rts: bool = True, use_tutel: bool = False, enable_expert_tensor_parallelism: bool = False,
        top2_2nd_expert_sampling: bool = True, *, output_dropout_prob: float = 0.0, identical_experts: bool = True,
    ):  # fmt: skip
        super().__init__()
        ep_size = groups.default_ep_size() if ep_size in (None, 1) else ep_size
        if problems := list(argument_problems(locals())):
            raise ValueError("\n".join(f"MoE: {problem}" for problem in problems))
        config = MoEConfig(
            num_experts=(num_experts,), topk=k, moe_train_capacity_factor=capacity_factor, moe_eval_capacity_factor=eval_capacity_factor,
            moe_min_capacity=min_capacity, moe_token_dropping=drop_tokens, moe_rts=use_rts, moe_noisy_gate_policy=noisy_gate_policy or "None",
            moe_top2_2nd_expert_sampling=top2_2nd_expert_sampling, moe_loss_coeff=0.0,
        )  # fmt: skip
        self.hidden_size, self.num_experts, self.ep_size, self.use_residual = hidden_size, num_experts, ep_size, use_residual
        self.output_dropout_prob, self.data_rank, self.is_parallel = output_dropout_prob, 0, False
        with torch.random.fork_rng([]):  # the core's first weights are drawn over, so that the seed gives those of DeepSpeed
            self.core = MoELayer(0, num_experts, hidden_size, 0, config, expert_factory=partial(_copied, expert), experts_may_draw=True)
        if not identical_experts:
            draw_apart(self.core.experts.stack, expert, num_experts)
        nn.init.kaiming_uniform_(self.core.gate.weight, a=math.sqrt(5))  # as an nn.Linear
        self.mlp = expert if use_residual else None
        self.coefficient = nn.Linear(hidden_size, 2) if use_residual else None
        self.tag_experts()
        speak_deepspeed(self)

    def forward(self, hidden_states: Tensor, used_token: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x_TD = self._tokens(hidden_states)
        y_TD, routing = self.core.routed(x_TD, self._known(x_TD, used_token))
        l_aux = routing.balance / max(x_TD.shape[0], 1)  # the core has the sum
        y_BD = y_TD.view_as(hidden_states)
        if self.coefficient is not None:
            c_B2 = F.softmax(self.coefficient(hidden_states), dim=-1)
            y_BD = y_BD * c_B2[..., :1] + output_of(self.mlp(hidden_states)) * c_B2[..., 1:]
        if self.output_dropout_prob:
            y_BD = F.dropout(y_BD, self.output_dropout_prob, self.training)
        if self.is_parallel and not torch.compiler.is_compiling():
            self.tag_experts()  # what FSDP has gathered are other parameters
        return y_BD.to(hidden_states.dtype), l_aux, routing.counts_E

    def _tokens(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.shape[-1:] != (self.hidden_size,):
            raise ValueError(
                f"MoE: the last dim of hidden_states must be hidden_size ({self.hidden_size}), not that of {list(hidden_states.shape)}; "
                f"project to that width before, or build the layer with another"
            )
        return hidden_states.reshape(-1, self.hidden_size)

    def _known(self, x_TD: Tensor, used_token: Tensor | None) -> TokenInfo:
        keys_T = drawn_keys(x_TD.shape[0], x_TD.device, self.data_rank) if self.training and self.draws else None
        if used_token is None:
            return TokenInfo(keys_T)
        if used_token.numel() != x_TD.shape[0]:
            raise ValueError(
                f"MoE: used_token must have a number for each of the {x_TD.shape[0]} tokens, 0 for those that are not routed; its shape is "
                f"{list(used_token.shape)}"
            )
        return TokenInfo(keys_T, used_T=used_token.reshape(-1).to(x_TD.device) != 0)

    @property
    def draws(self) -> bool:
        """Whether anything is random in training."""
        c = self.core.config
        is_drawn = c.moe_token_dropping and self.core.drop_order == "random"
        return is_drawn or c.draws_choices or c.moe_noisy_gate_policy == "Jitter"

    # ------------------------------------------------------------ over ranks

    @property
    def num_local_experts(self) -> int:
        return self.num_experts // self.ep_size

    @property
    def expert_group_name(self) -> str:
        return groups.group_name_of(self.ep_size)

    def parallelise_(self, mesh: ParallelMesh, degree: int | None = None) -> None:
        """In place: keep this rank's experts of `degree` (that of the constructor) shares, and send tokens to those of other ranks.

        Replaces the experts' parameters, so it comes before FSDP, which sums gradients, and before an optimizer. Nothing is
        sent: whoever calls it has made the ranks' weights equal.
        """
        ep = self.ep_size if degree is None else degree
        if self.is_parallel:
            raise ValueError(f"MoE: the experts are shared out over {self.ep_size} ranks already; build the layer anew for another layout")
        if self.num_experts % ep:
            raise ValueError("MoE: " + _not_divisible(self.num_experts, ep))
        if ep not in mesh.experts:
            raise ValueError(f"MoE: no mesh for ep_size {ep}, only for {sorted(mesh.experts)}; name it in build_mesh's expert_degrees")
        self.ep_size = ep
        split_experts(self.core, mesh, ep, "auto")
        self.core.reducer = reducer_over(mesh, ep)
        self.data_rank, self.is_parallel = mesh.rank("dp"), True
        self.tag_experts()

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """DeepSpeed's word for parallelise_, over the mesh of this run."""
        if use_data_before_expert_parallel_:
            raise ValueError(
                "MoE: use_data_before_expert_parallelism is not built: ranks that share the experts of a layer out follow each other; leave it out"
            )
        self.parallelise_(mpu.get_default_mesh())

    # ------------------------------------------------------------ the marks of experts' parameters

    def tag_experts(self) -> None:
        """What is_moe_param looks at. To be called again by whoever replaces parameters (FSDP does)."""
        for p in self.core.experts.parameters():
            p.allreduce, p.group_name = False, self.expert_group_name

    def _apply(self, fn: Any, recurse: bool = True) -> MoE:
        super()._apply(fn, recurse)
        self.tag_experts()  # to_empty() makes new parameters
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.tag_experts()  # copy.deepcopy copies parameters without their marks


def _copied(expert: nn.Module, _width: int) -> nn.Module:
    return copy.deepcopy(expert)


@torch.no_grad()
def draw_apart(stack: nn.Module, expert: nn.Module, num_experts: int) -> None:
    """Fill the stacks with weights that `expert`'s own modules draw, one expert after the other."""
    fresh = copy.deepcopy(expert)
    for number in range(num_experts):
        for name, module in fresh.named_modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
            elif module._parameters:
                raise ValueError(
                    f"MoE: identical_experts=False needs a method reset_parameters in each module that has parameters, and {name or 'expert'} "
                    f"({type(module).__name__}) has none; add one, or leave identical_experts out and give each expert its weights by "
                    f"load_state_dict"
                )
        for name, p in fresh.named_parameters():
            stack.get_parameter(name)[number].copy_(p)


_LEAST = {"hidden_size": 1, "num_experts": 1, "ep_size": 1, "k": 1, "min_capacity": 0}


def argument_problems(a: dict[str, Any]) -> Iterator[str]:
    """Of the constructor's arguments, by name."""
    if not isinstance(a["expert"], nn.Module):
        yield (f"expert must be an nn.Module, not {a['expert']!r}; give every argument behind hidden_size by name (in DeepSpeed 0.4 "
               f"output_dropout_prob came before expert)")  # fmt: skip
    wrong = [name for name, least in _LEAST.items() if not isinstance(a[name], int) or a[name] < least]
    yield from (f"{name} must be a whole number of at least {_LEAST[name]}, not {a[name]!r}" for name in wrong)
    if wrong:
        return  # what follows compares them
    for name in ("capacity_factor", "eval_capacity_factor"):
        if not 0 < a[name] < math.inf:
            yield f"{name} must be above 0 and finite, not {a[name]!r}; for experts that take all tokens give drop_tokens=False"
    if a["num_experts"] % a["ep_size"]:
        yield _not_divisible(a["num_experts"], a["ep_size"])
    if a["k"] > a["num_experts"]:
        yield f"k ({a['k']}) cannot exceed num_experts ({a['num_experts']}); lower k or raise num_experts"
    yield from _noise_problems(a["noisy_gate_policy"], a["k"])
    if not 0 <= a["output_dropout_prob"] < 1:
        yield f"output_dropout_prob must be at least 0 and below 1, not {a['output_dropout_prob']!r}"
    if a["use_tutel"]:
        yield "use_tutel=True asks for the kernels of Tutel, which are not used here: tokens travel by this package's own; leave it out"
    if a["enable_expert_tensor_parallelism"]:
        yield ("enable_expert_tensor_parallelism=True: what of a module is its inner width is not known, so it cannot be cut over ranks; leave "
               "it out, and give a larger ep_size in its place")  # fmt: skip


def _noise_problems(policy: str | None, k: int) -> Iterator[str]:
    if policy not in (None, "None", "Jitter", "RSample"):
        yield f"noisy_gate_policy must be None, 'None', 'Jitter' or 'RSample', not {policy!r}"
    elif policy == "RSample" and k != 1:
        yield f"noisy_gate_policy 'RSample' draws the expert of k = 1, and has no effect with k = {k}; use 'Jitter' or None"


def _not_divisible(num_experts: int, ep_size: int) -> str:
    legal = ", ".join(map(str, divisors(num_experts)))
    return f"num_experts ({num_experts}) must be divisible by ep_size ({ep_size}); use ep_size {legal}, or another number of experts"
