"""Mixture of experts: how many where, how tokens are routed, what is added to the loss.

Flag spellings and defaults are those of Megatron-DeepSpeed; the layer that they describe is DeepSpeed-MoE
(arXiv 2201.05596): Residual-MoE (section 4.1.1) and Pyramid-MoE (section 4.1.2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_moe.config.flags import checked, fields_of, flag, int_list
from megatron_moe.config.model import divisors

_TOKEN_CHOICE = (
    "moe_router_num_groups", "moe_router_group_topk", "moe_router_group_best", "moe_router_enable_expert_bias", "moe_router_bias_update_rate",
)  # fmt: skip
# What has no effect with a policy. Giving it is refused; the weight of the balance loss, whose default is not zero, is warned about.
WITHOUT_EFFECT: dict[str, tuple[str, ...]] = {
    "topk": (),
    "expert_choice": (*_TOKEN_CHOICE, "moe_router_normalize", "moe_token_drop_policy", "moe_eval_capacity_factor", "moe_global_loss_coeff"),
    "hash": (*_TOKEN_CHOICE, "moe_router_score_function", "moe_seq_loss_coeff", "moe_global_loss_coeff", "moe_router_z_loss_coeff"),
    "sinkhorn": (*_TOKEN_CHOICE, "moe_router_score_function"),
    "balanced": _TOKEN_CHOICE,
    "zipf": _TOKEN_CHOICE,
}
_OF_ONE_POLICY = {"moe_router_hash_seed": "hash", "moe_router_sinkhorn_iterations": "sinkhorn", "moe_router_zipf_exponent": "zipf"}


@dataclass(frozen=True)
class MoEConfig:
    """Mixture of experts."""

    num_experts: tuple[int, ...] = flag(
        (1,), "experts per MoE layer: one number, or one per MoE layer (a pyramid: 4 4 8 8), also as [4, 4, 8, 8]; a list whose "
        "length divides the number of MoE layers is repeated in blocks; 1 is a dense layer", parse=int_list, minimum=1,
        metavar="N")  # fmt: skip
    mlp_type: Literal["standard", "residual"] = flag(
        "standard", "residual: a dense MLP beside the experts, mixed by a learned two-way coefficient (Residual-MoE)"
    )
    moe_residual_combine: Literal["coefficient", "sum"] = flag(
        "coefficient", "how --mlp-type residual adds experts and MLP up: by a learned softmax of two weights per token (DeepSpeed), or as "
        "they are (the formula of the paper, arXiv 2201.05596 section 4.1.1)")  # fmt: skip
    moe_ffn_hidden_size: int | None = flag(None, "inner width of each expert; --ffn-hidden-size when not given", minimum=1)
    moe_shared_expert_intermediate_size: int | None = flag(
        None, "inner width of a shared expert: a dense MLP that every token passes beside its routed experts", minimum=1
    )
    moe_shared_expert_gate: bool = flag(False, "weigh the shared expert's output by a learned sigmoid per token (Qwen2-MoE)")
    moe_latent_size: int | None = flag(
        None, "experts work in this width: tokens are projected to it before they travel and back after; the router sees them whole",
        minimum=1)  # fmt: skip
    topk: int = flag(1, "experts per token (k)", names=("moe-router-topk",), minimum=1)
    expert_interval: int = flag(2, "layers divisible by this (counted from 1) are MoE layers", minimum=1)
    moe_first_k_dense_replace: int = flag(0, "the first so many layers are dense, whatever --expert-interval says (DeepSeek)", minimum=0)
    moe_expert_parallel_size: int = flag(
        1, "expert-parallel degree (EP); a layer with fewer experts uses that many",
        names=("expert-model-parallel-size",), minimum=1)  # fmt: skip
    moe_pyramid_ep: Literal["strict", "auto"] = flag(
        "strict", "a layer's experts and EP must divide each other; auto takes the largest common divisor instead"
    )
    moe_token_dropping: bool = flag(
        True, "experts take at most their capacity, further tokens pass by", negative=("disable-moe-token-dropping",)
    )
    moe_train_capacity_factor: float = flag(1.0, "capacity = ceil(tokens / experts x factor x k), in training", above=0)
    moe_eval_capacity_factor: float = flag(1.0, "the same in evaluation", above=0)
    moe_min_capacity: int = flag(4, "lower bound of the capacity", minimum=0)
    moe_rts: bool = flag(
        True, "random token selection: with k = 1, who is dropped is drawn instead of decided by position (arXiv 2109.10465)"
    )
    moe_token_drop_policy: Literal["auto", "random", "position", "probs"] = flag(
        "auto", "who is dropped over capacity; auto follows DeepSpeed: k=1 random (with --moe-rts), k=2 position with all second "
        "choices behind the first ones, k>=3 by gate probability")  # fmt: skip
    moe_top2_2nd_expert_sampling: bool = flag(
        True, "with k = 2, the second expert is drawn with Gumbel noise in training",
        negative=("disable-moe-top2-2nd-expert-sampling",))  # fmt: skip
    moe_noisy_gate_policy: Literal["None", "Jitter", "RSample"] = flag(
        "None", "training noise of the gate: Jitter scales its input by 1 +- 1%, RSample draws the top-1 expert"
    )
    moe_router_policy: Literal["topk", "expert_choice", "hash", "sinkhorn", "balanced", "zipf"] = flag(
        "topk", "who goes where. topk: every token takes its k best experts. expert_choice: every expert takes its best tokens, as many as "
        "its capacity, also with --disable-moe-token-dropping; that looks ahead, so in evaluation every token takes its k best experts, "
        "none dropped (arXiv 2202.09368). hash: k fixed experts for each word of the vocabulary, weights 1/k, nothing to learn for the "
        "router (arXiv 2106.04426). sinkhorn: top-k of balanced scores, plain in evaluation (S-BASE, arXiv 2202.01169). For benchmarks, "
        "with the weights of the real router: balanced (all experts alike), zipf (expert r gets a share of 1/r^exponent)",
    )  # fmt: skip
    moe_router_hash_seed: int = flag(1234, "which assignment of the vocabulary --moe-router-policy hash makes", minimum=0, maximum=2**62)
    moe_router_sinkhorn_iterations: int = flag(8, "rounds of balancing of --moe-router-policy sinkhorn", minimum=1)
    moe_router_zipf_exponent: float = flag(1.0, "skew of --moe-router-policy zipf; 0: none", minimum=0)
    moe_router_score_function: Literal["softmax", "sigmoid"] = flag(
        "softmax", "how logits become scores: softmax over the experts, or each expert by itself (DeepSeek-V3, arXiv 2412.19437)"
    )
    moe_router_normalize: Literal["auto", "none", "chosen", "survivors"] = flag(
        "auto", "gate weights: the raw scores, or divided by the sum over the chosen experts (for softmax the same as a softmax after "
        "top-k; norm_topk_prob in transformers), or over those that were not dropped (DeepSpeed); auto: none for k=1, expert_choice and sinkhorn, else survivors",
    )  # fmt: skip
    moe_router_pre_softmax: bool = flag(False, "same as --moe-router-normalize none (Megatron-Core's spelling)")
    moe_router_topk_scaling_factor: float = flag(1.0, "multiplies the gate weights", above=0)
    moe_router_num_groups: int | None = flag(
        None, "experts in this many groups (nodes), of which a token picks --moe-router-group-topk before it picks experts", minimum=1
    )
    moe_router_group_topk: int | None = flag(None, "groups that a token may send to", minimum=1)
    moe_router_group_best: int | None = flag(
        None, "a group counts as much as this many of its best experts together: k / --moe-router-group-topk when not given (DeepSeek-V3: 2); "
        "1 in DeepSeek-V2", minimum=1)  # fmt: skip
    moe_router_enable_expert_bias: bool = flag(
        False, "balance without a loss: a bias per expert is added to the scores when experts are chosen, not to the gate weights; after "
        "each step it rises for experts with fewer tokens than the mean and falls for the others (arXiv 2408.15664)",
    )  # fmt: skip
    moe_router_bias_update_rate: float = flag(1e-3, "step of that bias", minimum=0)
    moe_loss_coeff: float = flag(
        0.1, "weight of the load-balancing loss of a micro-batch (Switch, GShard), summed over the MoE layers; the published recipes use "
        "0.01", names=("moe-aux-loss-coeff",), minimum=0)  # fmt: skip
    moe_seq_loss_coeff: float = flag(
        0.0, "the same with the balance taken within each sequence (DeepSeek-V3's sequence-wise loss; it uses 1e-4)", minimum=0
    )
    moe_global_loss_coeff: float = flag(
        0.0, "the same with counts over all data ranks and the micro-batches of the step so far (arXiv 2501.11873)", minimum=0
    )
    moe_loss_warmup_iters: int = flag(0, "steps over which the weights of the auxiliary losses grow from zero", minimum=0)
    moe_router_z_loss_coeff: float = flag(
        0.0, "weight of the router z-loss, the mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906)",
        names=("moe-z-loss-coeff",), minimum=0)  # fmt: skip
    moe_token_dispatcher: Literal["auto", "alltoall", "allgather", "hierarchical", "fused"] = flag(
        "auto", "how tokens travel to their experts. alltoall: each row to its expert, in exact sizes. hierarchical: each token "
        "once to every node that has experts of it, then its rows within the node; sums come back. allgather: all tokens to all ranks. "
        "fused: kernels write rows into the memory of the other GPUs of the node, and no host waits. auto: nothing travels for EP 1 and "
        "ETP 1; fused where it can run; else all-gather when k reaches EP and reserves at most 1.25 times the rows of equally busy experts "
        "(a capacity bounds them); hierarchical when EP spans nodes and enough rows of a token go to the same one; else all-to-all. The log "
        "says which, and why", names=("moe-token-dispatcher-type",))  # fmt: skip
    moe_node_size: int | None = flag(
        None,
        "ranks per node, for --moe-token-dispatcher hierarchical and auto; LOCAL_WORLD_SIZE, which torchrun sets, when not given",
        minimum=1,
    )
    moe_fused_capacity: Literal["static", "exact", "worst"] = flag(
        "static", "how many rows a rank has room for with --moe-token-dispatcher fused. static: --moe-fused-capacity-factor times an even "
        "share; a step that brings more is repeated with more room before the weights move. exact: the host waits for the number, once per "
        "layer. worst: as many as can come at most")  # fmt: skip
    moe_fused_capacity_factor: float = flag(
        1.5, "rows that a rank has room for under --moe-fused-capacity static, over those of equally busy experts", minimum=1
    )
    moe_fused_kernels: Literal["triton", "cuda"] = flag(
        "triton", "what moves the rows of --moe-token-dispatcher fused. cuda: bulk copies of compute capability 9.0 and newer, in CUDA C++ that nvcc "
        "compiles when it is first used and keeps in ~/.cache/megatron_moe. Not yet measured on a GPU")  # fmt: skip
    moe_overlap_chunks: int = flag(
        1, "cut the tokens of an MoE layer in this many parts: while one is computed the next is under way, and the results of the last one "
        "(alltoall and hierarchical; the arithmetic is the same). Pays where the network is slow and parts are large", minimum=1)  # fmt: skip
    moe_pad_expert_input_to_capacity: bool = flag(
        False, "every expert gets exactly its capacity of rows from every rank, zeros where there are fewer: exchanges of equal sizes that "
        "no host waits for (DeepSpeed's layout). Costs rows, and memory, of experts x capacity whatever the load; without dropping the "
        "capacity is the largest load, which the host has to ask for")  # fmt: skip
    moe_expert_gemm: Literal["grouped_mm", "gather"] = flag(
        "grouped_mm", "how the experts' first products find their rows on a GPU. grouped_mm: torch's, of a copy of every token once per choice. "
        "gather: a Triton kernel that loads each row from where its token is, which saves that copy, its memory too; where no rows travel (EP 1, "
        "ETP 1), in 16 bits. Not yet measured on a GPU. On a CPU rows are copied either way")  # fmt: skip
    moe_fp8_experts: bool = flag(
        False, "the experts' products in FP8 (e4m3, a float32 scale per row of the tokens and per column of the matrices), forward and for the gradient "
        "of the rows; that of the matrices stays in the type of the rest. On a GPU of compute capability 9.0 or 10.x, with --bf16; elsewhere the same "
        "numbers by wider products, which is slower. Not yet measured on a GPU")  # fmt: skip
    moe_fp8_dispatch: bool = flag(
        False, "rows travel to their experts in FP8 (e4m3, a float32 scale per row): 1 byte per value and 4 per row, in place of 2 or 4 per value. Results, "
        "and all gradients, travel as they are. With the all-to-all")  # fmt: skip
    moe_identical_expert_init: bool = flag(False, "start all experts of a layer with the same weights, as DeepSpeed does")

    def __post_init__(self) -> None:
        checked(self)

    def problems(self) -> Iterator[str]:
        smallest = min((n for n in self.num_experts if n > 1), default=None)
        if smallest is not None and self.topk > smallest:
            yield f"--topk ({self.topk}) cannot exceed the experts of a layer ({smallest}); lower it or raise --num-experts"
        yield from self._policy_problems()
        yield from self._router_problems()
        yield from self._expert_problems()
        ep = self.moe_expert_parallel_size
        if self.moe_pyramid_ep == "strict":
            for n in sorted({n for n in self.num_experts if n > 1}):
                if max(n, ep) % min(n, ep):
                    yield (f"--num-experts ({n}) and --moe-expert-parallel-size ({ep}) must divide each other; for {n} experts "
                           f"use EP {_alternatives(n, ep)}, or --moe-pyramid-ep auto to take {math.gcd(n, ep)} there")  # fmt: skip

    def _policy_problems(self) -> Iterator[str]:
        policy, default = self.moe_router_policy, {s.name: s.default for s in fields_of(MoEConfig)}
        others = [name for name, owner in _OF_ONE_POLICY.items() if owner != policy]
        for name in (*WITHOUT_EFFECT[policy], *others):
            if getattr(self, name) != default[name]:
                yield f"--{name.replace('_', '-')} has no effect with --moe-router-policy {policy}; drop it, or choose another policy"
        noise = self.moe_noisy_gate_policy
        if (noise == "RSample" and policy != "topk") or (noise == "Jitter" and policy == "hash"):
            cure = "None" if policy == "hash" else "Jitter or None"
            yield f"--moe-noisy-gate-policy {noise} has no effect with --moe-router-policy {policy}; use {cure}"

    def _router_problems(self) -> Iterator[str]:
        k, groups, group_k, best = self.topk, self.moe_router_num_groups, self.moe_router_group_topk, self.moe_router_group_best
        if self.moe_noisy_gate_policy == "RSample" and k != 1:
            yield f"--moe-noisy-gate-policy RSample is defined for --topk 1 only, not {k}; use Jitter or None"
        if self.moe_router_pre_softmax and self.moe_router_normalize not in ("auto", "none"):
            yield f"--moe-router-pre-softmax and --moe-router-normalize {self.moe_router_normalize} exclude each other; drop one"
        if k == 1 and self.has_experts and self.normalize != "none":
            yield (f"--moe-router-normalize {self.normalize} with --topk 1 makes every gate weight 1, and the router gets no gradient; use "
                   "--moe-router-normalize none or --topk 2")  # fmt: skip
        if (groups is None) != (group_k is None):
            yield "--moe-router-num-groups and --moe-router-group-topk belong together; give both or neither"
        elif groups is None and best is not None:
            yield "--moe-router-group-best is about groups of experts; give --moe-router-num-groups and --moe-router-group-topk too"
        elif groups is not None and group_k is not None:
            for n in sorted({n for n in self.num_experts if n > 1}):
                if n % groups:
                    yield f"--moe-router-num-groups ({groups}) must divide the experts of a layer ({n}); use {_any_of(divisors(n))}"
                elif group_k > groups or group_k * (n // groups) < k or (best is None and k % group_k):
                    legal = [g for g in divisors(k) if g <= groups and g * (n // groups) >= k]
                    yield (f"--moe-router-group-topk ({group_k}) must divide --topk ({k}) unless --moe-router-group-best is given, not exceed the "
                           f"{groups} groups and leave {k} experts to choose from ({n // groups} per group); use "
                           f"{_any_of(legal) if legal else 'another number of groups'}")  # fmt: skip
                elif best is not None and best > n // groups:
                    yield f"--moe-router-group-best ({best}) must not exceed the experts of a group ({n} / {groups} = {n // groups})"
        if self.draws_choices and (groups is not None or self.moe_router_enable_expert_bias):
            name = "--moe-noisy-gate-policy RSample" if k == 1 else "the sampling of the second expert"
            cure = "drop it" if k == 1 else "add --disable-moe-top2-2nd-expert-sampling"
            yield f"{name} draws from the logits alone and knows neither groups nor an expert bias; {cure}"

    def _expert_problems(self) -> Iterator[str]:
        if self.mlp_type == "residual" and self.moe_shared_expert_intermediate_size:
            yield (f"--mlp-type residual and --moe-shared-expert-intermediate-size ({self.moe_shared_expert_intermediate_size}) both put a "
                   "dense MLP beside the experts; keep one (residual with --moe-residual-combine sum is a shared expert of the width "
                   "--ffn-hidden-size)")  # fmt: skip
        if self.moe_shared_expert_gate and not self.moe_shared_expert_intermediate_size:
            yield "--moe-shared-expert-gate needs a shared expert; give --moe-shared-expert-intermediate-size, or drop the gate"
        if self.moe_residual_combine == "sum" and self.mlp_type != "residual":
            yield "--moe-residual-combine sum is about the MLP of --mlp-type residual; add that, or drop it"
        yield from self._dispatch_problems()

        if self.moe_fp8_experts and self.moe_expert_gemm == "gather":
            yield "--moe-expert-gemm gather multiplies in 16 bits, and --moe-fp8-experts in 8; drop one of the two"

    def _dispatch_problems(self) -> Iterator[str]:
        kind, pad, chunks = self.moe_token_dispatcher, self.moe_pad_expert_input_to_capacity, self.moe_overlap_chunks
        if pad and kind == "allgather":
            yield ("--moe-pad-expert-input-to-capacity makes the exchanges of an all-to-all equal, and --moe-token-dispatcher allgather "
                   "exchanges no rows; use alltoall or auto, or drop the padding")  # fmt: skip
        if pad and kind == "hierarchical":
            yield ("--moe-pad-expert-input-to-capacity sends zero rows too, and --moe-token-dispatcher hierarchical sends none between nodes; use "
                   "alltoall or auto, or drop the padding")  # fmt: skip
        if pad and kind == "fused":
            yield ("--moe-pad-expert-input-to-capacity makes exchanges of equal sizes so that no host waits, and with --moe-token-dispatcher fused "
                   "none does; drop one of the two")  # fmt: skip
        if chunks > 1 and kind == "fused":
            yield (f"--moe-overlap-chunks ({chunks}) cuts the exchanges of an all-to-all, and --moe-token-dispatcher fused has none; use alltoall, "
                   "hierarchical or auto, or drop the chunks")  # fmt: skip
        default = {s.name: s.default for s in fields_of(MoEConfig)}
        names = ("moe_fused_capacity", "moe_fused_capacity_factor", "moe_fused_kernels")
        if kind not in ("auto", "fused") and (given := [name for name in names if getattr(self, name) != default[name]]):
            flags = " and ".join(f"--{name.replace('_', '-')}" for name in given)
            yield f"{flags}: about --moe-token-dispatcher fused, not {kind}; drop it, or take fused"
        elif self.moe_fused_capacity != "static" and self.moe_fused_capacity_factor != default["moe_fused_capacity_factor"]:
            yield (f"--moe-fused-capacity-factor ({self.moe_fused_capacity_factor:g}) is about --moe-fused-capacity static, not "
                   f"{self.moe_fused_capacity}; drop one of the two")  # fmt: skip
        if chunks > 1 and pad:
            yield (f"--moe-overlap-chunks ({chunks}) cuts the tokens, and --moe-pad-expert-input-to-capacity would fill up every part to the capacity "
                   "of all of them; drop one of the two")  # fmt: skip
        if chunks > 1 and kind == "allgather":
            yield (f"--moe-overlap-chunks ({chunks}) cuts the exchange of rows, and --moe-token-dispatcher allgather exchanges none; use alltoall, "
                   "hierarchical or auto, or drop the chunks")  # fmt: skip

        if self.moe_fp8_dispatch and kind not in ("auto", "alltoall"):
            yield f"--moe-fp8-dispatch sends rows by an all-to-all, and --moe-token-dispatcher is {kind}; use alltoall or auto, or drop one of the two"
        if self.moe_fp8_dispatch and pad:
            yield "--moe-fp8-dispatch sends rows in exact sizes, and --moe-pad-expert-input-to-capacity fills them up; drop one of the two"

    def expert_ffn_size(self, dense: int) -> int:
        """Inner width of an expert, where that of the dense MLP is `dense`."""
        return self.moe_ffn_hidden_size or dense

    @property
    def group_best(self) -> int | None:
        """Experts whose scores together are a group's; None without groups."""
        if self.moe_router_group_topk is None:
            return None
        return self.moe_router_group_best or self.topk // self.moe_router_group_topk

    @property
    def residual(self) -> str | None:
        """How a MoE layer adds up its experts and the dense MLP beside them: coefficient or sum; None without that MLP."""
        return self.moe_residual_combine if self.mlp_type == "residual" else None

    @property
    def normalize(self) -> str:
        """none, chosen or survivors: over what gate weights are renormalised."""
        if self.moe_router_normalize != "auto":
            return self.moe_router_normalize
        is_raw = self.topk == 1 or self.moe_router_pre_softmax or self.moe_router_policy in ("expert_choice", "sinkhorn")
        return "none" if is_raw else "survivors"

    @property
    def draws_choices(self) -> bool:
        """Whether Gumbel noise takes part in the choice: the expert of k = 1 (RSample), the second expert of k = 2."""
        if self.moe_router_policy != "topk":
            return False
        return (self.topk == 1 and self.moe_noisy_gate_policy == "RSample") or (self.topk == 2 and self.moe_top2_2nd_expert_sampling)

    @property
    def has_experts(self) -> bool:
        return any(n > 1 for n in self.num_experts)

    def experts_per_layer(self, num_layers: int) -> tuple[int, ...]:
        """Experts of each layer, 1 where it is dense. Layer n (from 1) is MoE when expert_interval divides it and it is not one of the
        first dense ones.

        Example: 8 layers, interval 2, experts (4, 8) -> (1, 4, 1, 4, 1, 8, 1, 8); with 2 dense first, experts (4,) -> (1, 1, 1, 4, 1, 4, 1, 4).
        """
        interval, dense = self.expert_interval, self.moe_first_k_dense_replace
        skipped = dense // interval
        slots = max(num_layers // interval - skipped, 0)
        given = self.num_experts
        if not self.has_experts:
            return (1,) * num_layers
        if slots == 0 or slots % len(given):
            raise ValueError(
                f"--num-experts has {len(given)} entries, but {num_layers} layers with --expert-interval {interval}"
                + (f" and --moe-first-k-dense-replace {dense}" if dense else "")
                + f" make {slots} MoE layers; "
                + (f"give {_any_of(divisors(slots))} entries" if slots else f"lower {'one of them' if dense else '--expert-interval'}")
            )
        blocks = [n for n in given for _ in range(slots // len(given))]
        return tuple(blocks[i // interval - 1 - skipped] if i > dense and i % interval == 0 else 1 for i in range(1, num_layers + 1))

    def expert_parallel_degree(self, num_experts: int) -> int:
        """EP degree of a layer with `num_experts` experts (DeepSpeed-MoE paper, section 4.1.3)."""
        ep = self.moe_expert_parallel_size
        return math.gcd(num_experts, ep) if self.moe_pyramid_ep == "auto" else min(num_experts, ep)


def _any_of(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers[:-1])) + f" or {numbers[-1]}" if len(numbers) > 1 else str(numbers[0])


def _alternatives(num_experts: int, ep: int) -> str:
    legal = divisors(num_experts) + [num_experts * i for i in (2, 4)]
    return ", ".join(map(str, legal))
