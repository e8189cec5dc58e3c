"""RunConfig: all groups together, what can only be checked across them, and what follows from them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from megatron_moe.config.curriculum import CurriculumConfig
from megatron_moe.config.data import DataConfig, TokenizerConfig
from megatron_moe.config.distillation import DistillationConfig
from megatron_moe.config.flags import ConfigError, FieldSpec, bound_problems, fields_of
from megatron_moe.config.memory import MemoryConfig
from megatron_moe.config.model import ModelConfig, divisors
from megatron_moe.config.moe import MoEConfig
from megatron_moe.config.output import CheckpointConfig, LoggingConfig
from megatron_moe.config.pace import Consumed, Pace, RampUp
from megatron_moe.config.parallel import ParallelConfig, divides_over_nodes, split_over_nodes
from megatron_moe.config.pipeline import (
    Split,
    layers_of_stages,
    microbatch_problems,
    microbatch_warnings,
    pipeline_problems,
    pipeline_warnings,
)
from megatron_moe.config.precision import LossScaleConfig
from megatron_moe.config.training import OptimizerConfig, TrainingConfig
from megatron_moe.config.upcycling import UpcyclingConfig, upcycling_problems, upcycling_warnings

GROUPS: dict[str, type] = {
    "model": ModelConfig,
    "moe": MoEConfig,
    "parallel": ParallelConfig,
    "training": TrainingConfig,
    "scale": LossScaleConfig,
    "memory": MemoryConfig,
    "optimizer": OptimizerConfig,
    "curriculum": CurriculumConfig,
    "distillation": DistillationConfig,
    "upcycling": UpcyclingConfig,
    "tokenizer": TokenizerConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
    "logging": LoggingConfig,
}
FIELDS: dict[str, FieldSpec] = {s.name: s for group in GROUPS.values() for s in fields_of(group)}


@dataclass(frozen=True)
class RunConfig:
    """A whole run. Built by `from_values`, which reports the problems of all groups at once."""

    model: ModelConfig = field(default_factory=ModelConfig)
    moe: MoEConfig = field(default_factory=MoEConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    curriculum: CurriculumConfig = field(default_factory=CurriculumConfig)
    distillation: DistillationConfig = field(default_factory=DistillationConfig)
    upcycling: UpcyclingConfig = field(default_factory=UpcyclingConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self) -> None:
        problems = list(self.problems())
        if problems:
            raise ConfigError(problems)

    @classmethod
    def from_values(cls, values: dict[str, Any]) -> RunConfig:
        """Typed values by field name -> RunConfig. Raises ConfigError with the problems of every group."""
        problems: list[str] = []
        groups = {}
        for name, group in GROUPS.items():
            mine = {s.name: values[s.name] for s in fields_of(group) if s.name in values}
            try:
                groups[name] = group(**mine)
            except ConfigError as error:
                problems += error.problems
        if not problems:
            return cls(**groups)
        # What can be said across groups is said too, as long as every number is in its range.
        if not any(bound_problems(group, values) for group in GROUPS.values()):
            problems += cls._unchecked(values).problems()
        raise ConfigError(problems)

    @classmethod
    def _unchecked(cls, values: dict[str, Any]) -> RunConfig:
        """The same without any check, only to ask for further problems."""
        run = object.__new__(cls)
        for name, group in GROUPS.items():
            config = object.__new__(group)
            for s in fields_of(group):
                object.__setattr__(config, s.name, values.get(s.name, s.default))
            object.__setattr__(run, name, config)
        return run

    def problems(self) -> Iterator[str]:
        own = list(self._own_problems())
        yield from own
        if self.distillation.is_on:
            yield from self._teacher_problems(own)

    def _own_problems(self) -> Iterator[str]:
        m, t, tp = self.model, self.training, self.parallel.tensor_model_parallel_size
        if t.seq_length > m.max_position_embeddings:
            yield (f"--seq-length ({t.seq_length}) must not exceed --max-position-embeddings ({m.max_position_embeddings}); "
                   f"raise the latter or shorten the sequence")  # fmt: skip
        if m.num_attention_heads % tp:
            yield (f"--num-attention-heads ({m.num_attention_heads}) must be divisible by --tensor-model-parallel-size ({tp}); "
                   f"use TP {_one_of(m.num_attention_heads)}")  # fmt: skip
        elif m.key_value_heads % tp and tp % m.key_value_heads:
            legal = [n for n in divisors(m.num_attention_heads) if m.key_value_heads % n == 0 or n % m.key_value_heads == 0]
            yield (f"--num-key-value-heads ({m.key_value_heads}) must be divisible by --tensor-model-parallel-size ({tp}) or divide it; "
                   f"use TP {', '.join(map(str, legal))}")  # fmt: skip
        if m.ffn_size % tp:
            yield f"the MLP width ({m.ffn_size}) must be divisible by --tensor-model-parallel-size ({tp}); change --ffn-hidden-size"
        shared = self.moe.moe_shared_expert_intermediate_size
        if shared and shared % tp:
            yield (f"--moe-shared-expert-intermediate-size ({shared}) must be divisible by --tensor-model-parallel-size ({tp}); use "
                   f"{shared // tp * tp or tp} or TP {_one_of(shared)}")  # fmt: skip
        if m.make_vocab_size_divisible_by % tp:
            yield (f"--make-vocab-size-divisible-by ({m.make_vocab_size_divisible_by}) must be divisible by "
                   f"--tensor-model-parallel-size ({tp}), so that the padded vocabulary splits evenly under every layout")  # fmt: skip
        etp, width = self.parallel.etp, self.moe.expert_ffn_size(m.ffn_size)
        if self.moe.has_experts and width % etp:
            yield (f"the width of the experts ({width}) must be divisible by the expert-tensor-parallel degree ({etp}); use ETP "
                   f"{_one_of(width)} or change --moe-ffn-hidden-size")  # fmt: skip
        yield from self._expert_product_problems()
        yield from self._length_problems()
        try:
            self.moe.experts_per_layer(m.num_layers)
        except ValueError as error:
            yield str(error)
        c = self.curriculum
        longest, shortest = c.longest(t.seq_length), c.curriculum_min_difficulty or 1
        if longest > t.seq_length:
            yield f"a curriculum up to {longest} tokens does not fit into --seq-length ({t.seq_length}); raise it or lower the curriculum's end"
        elif c.curriculum_learning and c.curriculum_schedule_type != "fixed_discrete" and shortest > longest:
            yield f"--curriculum-min-difficulty ({shortest}) must not exceed the longest length ({longest})"
        if t.fp16_master_weights_and_grads and self.optimizer.optimizer != "adam":
            yield (f"--fp16-master-weights-and-grads is built for --optimizer adam, not {self.optimizer.optimizer}: another one would "
                   f"lose its updates to rounding; drop one")  # fmt: skip
        if t.fp16_master_weights_and_grads and self.optimizer.adam_kernel == "apex":
            yield "--fp16-master-weights-and-grads has an AdamW of its own, and --adam-kernel apex asks for another; drop one"
        if c.curriculum_learning and t.compile:
            yield "--compile makes graphs of one sequence length and --curriculum-learning has many; leave one of them out"
        if m.mtp_num_layers >= t.seq_length:
            yield (f"--mtp-num-layers ({m.mtp_num_layers}) must be less than --seq-length ({t.seq_length}): the last module would have nothing "
                   "to predict within a sequence; the published models have 1")  # fmt: skip
        yield from pipeline_problems(self.parallel, m, t, self.distillation.is_on)
        yield from self._ring_problems()
        yield from self._fused_problems()
        if t.cuda_graph_impl != "none":
            yield from self._graph_problems()
        yield from upcycling_problems(self)
        if self.data.data_order == "megatron" and t.seed >= 2**32:
            yield f"--data-order megatron takes a --seed below {2**32}, not {t.seed}: that is all that Megatron's generator can be given"

    def _expert_product_problems(self) -> Iterator[str]:
        m, moe, t, etp = self.model, self.moe, self.training, self.parallel.etp
        if t.compile and moe.moe_expert_gemm == "gather":
            yield "--moe-expert-gemm gather is a kernel of its own, which --compile does not trace; drop one of the two"
        if not (moe.moe_fp8_experts and moe.has_experts):
            return
        if t.fp16:
            yield "--moe-fp8-experts keeps all but the products in bfloat16, and --fp16 asks for float16; use --bf16"
        width, inner = moe.moe_latent_size or m.hidden_size, moe.expert_ffn_size(m.ffn_size)
        of = "--moe-latent-size" if moe.moe_latent_size else "--hidden-size"
        if width % 16:
            yield f"--moe-fp8-experts needs widths that are multiples of 16, and {of} is {width}; use {width // 16 * 16 or 16} or {-(-width // 16) * 16}"
        if inner % (16 * etp):
            share = f", of which each of {etp} expert-tensor-parallel ranks has its share" if etp > 1 else ""
            yield (f"--moe-fp8-experts needs widths that are multiples of 16, and that of the experts is {inner}{share}; set --moe-ffn-hidden-size to a "
                   f"multiple of {16 * etp}")  # fmt: skip

    def _ring_problems(self) -> Iterator[str]:
        """What the kernels of a ring of keys cannot do."""
        if not self.parallel.has_ring:
            return
        what, instead = "--cp-comm-type p2p", "or take --cp-comm-type all_gather"
        if self.model.attention_dropout:
            yield f"{what} has no dropout of attention, and --attention-dropout is {self.model.attention_dropout:g}; set it to 0, {instead}"
        if self.data.reset_attention_mask:
            yield f"{what} has no masks of documents, which --reset-attention-mask asks for; leave one of them out"
        if (width := max(self.model.qk_width, self.model.v_width)) % 8:
            cure = "--qk-head-dim" if self.model.multi_latent_attention else "--num-attention-heads"
            yield f"{what} wants heads whose width is a multiple of 8, not {width}; change {cure}, {instead}"
        if self.model.window_size is not None:
            yield (f"{what} has kernels without a window, and --window-size is {self.model.window_size}: every rank's keys would pass by, in the "
                   f"window or not; drop the window, {instead}")  # fmt: skip
        if self.model.softmax_type == "learnable":
            yield f"{what} merges partial softmaxes that know of no sinks, which --softmax-type learnable asks for; drop them, {instead}"
        if self.training.compile:
            yield f"{what} is a loop that --compile does not trace; leave one of them out"

    def _graph_problems(self) -> Iterator[str]:
        """What a graph of a whole step cannot hold."""
        p, m, what, out = self.parallel, self.moe, f"--cuda-graph-impl {self.training.cuda_graph_impl}", "or leave the graph out"
        if p.pipeline_model_parallel_size > 1:
            yield (f"{what} is of one stage, and --pipeline-model-parallel-size is {p.pipeline_model_parallel_size}: stages wait for each other's "
                   f"micro-batches; set it to 1, {out}")  # fmt: skip
        if p.zero_stage == 3:
            yield (f"{what} does not go with --zero-stage 3: parameters are gathered again on streams of FSDP's own, which a capture does not "
                   f"allow; use --zero-stage 2, {out}")  # fmt: skip
        if p.has_ring:
            yield f"{what} is not built for --cp-comm-type p2p; use all_gather, {out}"
        if self.curriculum.curriculum_learning:
            yield f"{what} is of one sequence length, and --curriculum-learning has many; leave one of them out"
        if self.distillation.is_on:
            yield f"{what} is not built for --mos or --kd, whose teacher leaves in mid-run; leave one of them out"
        for name, is_given in (("--cpu-offloading", self.memory.cpu_offloading), ("--cpu-optimizer", self.memory.cpu_optimizer)):
            if is_given:
                yield f"{what} works in the memory of the GPU alone, and {name} moves some of it to the host; leave one of them out"
        if m.has_experts:
            yield from self._graph_expert_problems(what, out)

    def _graph_expert_problems(self, what: str, out: str) -> Iterator[str]:
        """Where the host would wait for the sizes of experts. (Dispatchers that `auto` takes are looked at when they are there.)"""
        p, m, t = self.parallel, self.moe, self.training
        width, inner = m.moe_latent_size or self.model.hidden_size, m.expert_ffn_size(self.model.ffn_size) // p.etp
        if not t.half:
            yield f"{what} waits for nothing, and torch's grouped products in {t.params_dtype} read the sizes of experts on the host; use --bf16, {out}"
        elif width % 8 or inner % 8:
            yield (f"{what} waits for nothing, and experts whose widths are not multiples of 8 ({width} and {inner} here) are a loop that reads their "
                   f"sizes on the host; change --hidden-size, --moe-latent-size or --moe-ffn-hidden-size, {out}")  # fmt: skip
        is_exact = m.moe_token_dispatcher in ("alltoall", "hierarchical") and not m.moe_pad_expert_input_to_capacity
        if is_exact and m.moe_expert_parallel_size * p.etp > 1:
            yield (f"{what} waits for nothing, and --moe-token-dispatcher {m.moe_token_dispatcher} tells its sizes to the host; use fused or "
                   f"allgather, {out}")  # fmt: skip
        if m.moe_token_dispatcher == "fused" and m.moe_fused_capacity == "exact":
            yield (f"{what} waits for nothing, and --moe-fused-capacity exact asks how many rows come; use static or worst, {out}")

    def _fused_problems(self) -> Iterator[str]:
        """What the kernels of --moe-token-dispatcher fused cannot do."""
        m, etp, bytes_each = self.moe, self.parallel.etp, self.training.bytes_per_activation
        if m.moe_token_dispatcher != "fused" or m.moe_expert_parallel_size == 1:
            return
        if etp > 1:
            yield (f"--moe-token-dispatcher fused sends rows to whole experts, and the expert-tensor-parallel degree is {etp}; set "
                   "--expert-tensor-parallel-size 1, or take --moe-token-dispatcher alltoall")  # fmt: skip
        width, option = (m.moe_latent_size, "--moe-latent-size") if m.moe_latent_size else (self.model.hidden_size, "--hidden-size")
        step = 16 // bytes_each
        if width % step:
            nearest = " or ".join(str(n) for n in (width // step * step, -(-width // step) * step) if n)
            yield (f"--moe-token-dispatcher fused moves 16 bytes at a time, and {option} ({width}) times {bytes_each} bytes is not a multiple of that; "
                   f"use {nearest}, or --moe-token-dispatcher alltoall")  # fmt: skip

    def _length_problems(self) -> Iterator[str]:
        """Sequences are cut into equal parts, the short ones of a curriculum too."""
        p, c, unit = self.parallel, self.curriculum, self.parallel.sequence_unit
        lengths = {"--seq-length": [self.training.seq_length]}
        if c.curriculum_learning and c.curriculum_schedule_type == "fixed_discrete":
            lengths["--curriculum-difficulty"] = list(c.curriculum_difficulty or ())
        elif c.curriculum_learning:
            names = ("curriculum_min_difficulty", "curriculum_max_difficulty", "curriculum_difficulty_step")
            lengths |= {f"--{name.replace('_', '-')}": [getattr(c, name)] for name in names if getattr(c, name)}
        parts = [f"2 x --context-parallel-size ({p.context_parallel_size})"] if p.context_parallel_size > 1 else []
        if p.sequence_parallel and p.tensor_model_parallel_size > 1:
            parts.append(f"--tensor-model-parallel-size ({p.tensor_model_parallel_size}) of --sequence-parallel")
        for option, wrong in ((o, n) for o, values in lengths.items() for n in values if n % unit):
            below = wrong // unit * unit
            yield (f"{option} ({wrong}) must be divisible by {unit}, which {' and '.join(parts)} ask for; use "
                   f"{f'{below} or ' if below else ''}{below + unit}")  # fmt: skip

    def _teacher_problems(self, own: list[str]) -> Iterator[str]:
        """What is wrong with the teacher and is not wrong with the student already."""
        try:
            self.teacher()
        except ConfigError as error:
            known = {*own, *(p for group in GROUPS for p in getattr(self, group).problems())}
            for problem in (p for p in error.problems if p not in known):
                yield "the teacher: " + re.sub(_OF_THE_TEACHER, r"--\1-teacher", problem)

    def teacher(self) -> RunConfig:
        """The run whose model the teacher is. It adds nothing to a loss and recomputes nothing: there is no backward.

        An MLP width that follows from the hidden size follows from the teacher's.
        """
        d, m, t = self.distillation, self.model, self.training
        model = dataclasses.replace(
            m, num_layers=d.num_layers_teacher or m.num_layers, hidden_size=d.hidden_size_teacher or m.hidden_size,
            num_attention_heads=d.num_attention_heads_teacher or m.num_attention_heads, mtp_num_layers=0,
        )  # fmt: skip
        losses = {s.name: 0.0 for s in fields_of(MoEConfig) if s.name.endswith("loss_coeff")}
        moe = dataclasses.replace(self.moe, num_experts=d.num_experts_teacher, **losses)
        training = dataclasses.replace(t, checkpoint_activations=False, recompute_activations=False, recompute_granularity=None,
                                       recompute_modules=None, moe_layer_recompute=False, fp16_master_weights_and_grads=False)  # fmt: skip
        memory = dataclasses.replace(self.memory, cpu_offloading=False, cpu_optimizer=False)
        return dataclasses.replace(self, model=model, moe=moe, training=training, memory=memory, distillation=DistillationConfig())

    def dense(self) -> RunConfig:
        """The run of the dense model that --moe-use-upcycling starts from, laid out like this one."""
        return dataclasses.replace(self, moe=MoEConfig(), upcycling=UpcyclingConfig(), distillation=DistillationConfig())

    def warnings(self, given: Collection[str] = ()) -> Iterator[str]:
        """What is allowed but probably not meant. `given`: names of the settings that somebody chose, also where that is the default."""
        for name in ("sequence_parallel", "enable_expert_tensor_parallelism"):
            if getattr(self.parallel, name) and self.parallel.tensor_model_parallel_size == 1:
                yield f"--{name.replace('_', '-')} has no effect with --tensor-model-parallel-size 1"
        yield from self._precision_warnings(given)
        yield from pipeline_warnings(self.parallel)
        yield from self.checkpoint.warnings()
        t = self.training
        if self.checkpoint.save_best and not t.eval_iters:
            yield "--save-best has no effect with --eval-iters 0: nothing is evaluated"
        if t.check_replicas_interval and t.train_iters and t.check_replicas_interval > t.train_iters:
            yield (f"--check-replicas-interval ({t.check_replicas_interval}) is longer than the run ({t.train_iters} steps): replicas are "
                   "never compared")  # fmt: skip
        yield from self._expert_layout_warnings()
        yield from (f"{option} has no effect: it is a setting of --mos and --kd" for option in self.distillation.idle)
        yield from (f"{option} has no effect: it is a setting of {of}" for option, of in (self.curriculum.idle | self.model.idle).items())
        if self.model.add_qkv_bias and self.model.add_bias_linear:
            yield "--add-qkv-bias has no effect with biases in all linear layers; add --disable-bias-linear"
        if self.moe.moe_first_k_dense_replace and not self.moe.has_experts:
            yield f"--moe-first-k-dense-replace ({self.moe.moe_first_k_dense_replace}) has no effect: all layers are dense; see --num-experts"
        yield from upcycling_warnings(self)
        if self.distillation.mos and not self.moe.has_experts:
            yield "--mos with a dense student is plain distillation (--kd): a Mixture-of-Students keeps its experts; see --num-experts"
        if (longest := self.curriculum.longest(self.training.seq_length)) < self.training.seq_length:
            yield f"the curriculum ends at {longest} tokens: the model never trains on the full --seq-length ({self.training.seq_length})"
        experts = self.moe.num_experts
        if experts[0] > experts[-1]:
            yield f"--num-experts falls with depth ({' '.join(map(str, experts))}): published pyramids grow, later layers gain more"
        if self.moe.has_experts:
            yield from self._policy_warnings("moe_loss_coeff" in given)

    def _precision_warnings(self, given: Collection[str]) -> Iterator[str]:
        """Settings of a precision, an optimizer or a way to save memory that is not chosen."""
        t, scale = self.training, self.scale
        for s in (s for s in fields_of(LossScaleConfig) if s.name in given):
            if not t.fp16:
                yield f"{s.option} has no effect: there is a loss scale with --fp16 only"
            elif scale.loss_scale is not None and s.name != "loss_scale":
                yield f"{s.option} has no effect: the scale stays what --loss-scale ({scale.loss_scale:g}) says"
        if self.optimizer.optimizer != "muon":
            own = (s.option for s in fields_of(OptimizerConfig) if s.name.startswith("muon_") and s.name in given)
            yield from (f"{option} has no effect: it is a setting of --optimizer muon" for option in own)
        if self.optimizer.adam_kernel == "apex" and self.optimizer.optimizer != "adam":
            yield f"--adam-kernel apex has no effect with --optimizer {self.optimizer.optimizer}"
        if t.moe_layer_recompute and not self.moe.has_experts:
            yield "--moe-layer-recompute has no effect: there are no experts; see --num-experts"
        if self.memory.cpu_offloading and t.recompute == "full":
            yield "--cpu-offloading moves little with --recompute-granularity full: what recomputation starts from stays on the device"
        if self.memory.cross_entropy_loss_chunk_size and self.distillation.is_on:
            yield "--cross-entropy-loss-chunk-size has no effect with a teacher: the distance to it is one of whole logits"

    def _expert_layout_warnings(self) -> Iterator[str]:
        p, m = self.parallel, self.moe
        if p.cp_comm_type == "p2p" and not p.has_ring:
            yield "--cp-comm-type p2p has no effect with --context-parallel-size 1"
        if p.etp > 1 and not m.has_experts:
            name = "--enable-expert-tensor-parallelism" if p.enable_expert_tensor_parallelism else "--expert-tensor-parallel-size"
            yield f"{name} has no effect without experts; see --num-experts"
        if m.moe_node_size is not None and m.moe_token_dispatcher not in ("hierarchical", "auto"):
            yield f"--moe-node-size ({m.moe_node_size}) has no effect with --moe-token-dispatcher {m.moe_token_dispatcher}"
        if m.moe_overlap_chunks > 1 and m.moe_expert_parallel_size == 1:
            yield f"--moe-overlap-chunks ({m.moe_overlap_chunks}) has no effect with --moe-expert-parallel-size 1: no rows are exchanged"

        yield from self._expert_product_warnings()

    def _expert_product_warnings(self) -> Iterator[str]:
        p, m, is_reference = self.parallel, self.moe, self.training.moe_kernels == "reference"
        for option, is_on in (("--moe-expert-gemm gather", m.moe_expert_gemm == "gather"), ("--moe-fp8-experts", m.moe_fp8_experts)):
            if is_on and not m.has_experts:
                yield f"{option} has no effect without experts; see --num-experts"
        if m.moe_fp8_dispatch and m.moe_expert_parallel_size == 1:
            yield "--moe-fp8-dispatch has no effect with --moe-expert-parallel-size 1: no rows are exchanged"
        if m.moe_expert_gemm == "gather" and m.has_experts:
            if m.moe_expert_parallel_size * p.etp > 1:
                yield (f"--moe-expert-gemm gather has no effect with --moe-expert-parallel-size {m.moe_expert_parallel_size} and ETP {p.etp}: rows that travel "
                       "are copied for it")  # fmt: skip
            if m.moe_pad_expert_input_to_capacity:
                yield "--moe-expert-gemm gather has no effect with --moe-pad-expert-input-to-capacity, which copies the rows to fill them up"
            if is_reference:
                yield "--moe-expert-gemm gather has no effect with --moe-kernels reference"
            if self.training.half is None:
                yield "--moe-expert-gemm gather has no effect without --bf16 or --fp16: its kernel multiplies in 16 bits"

    def _policy_warnings(self, is_loss_given: bool) -> Iterator[str]:
        policy = self.moe.moe_router_policy
        if policy == "expert_choice":
            yield ("--moe-router-policy expert_choice looks ahead in a causal model: which experts see a token depends on later tokens, so the "
                   "training loss is better than what the model can do; evaluation and generation choose by token and say the truth")  # fmt: skip
        if policy in ("expert_choice", "hash") and is_loss_given and self.moe.moe_loss_coeff:
            why = "every expert takes equally many tokens" if policy == "expert_choice" else "the router chooses nothing"
            yield f"--moe-loss-coeff ({self.moe.moe_loss_coeff:g}) has no effect with --moe-router-policy {policy}: {why}"

    def without_mtp(self) -> RunConfig:
        """The same of the model alone, as it is used when it is trained."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, mtp_num_layers=0)) if self.model.mtp_num_layers else self

    def experts_of_blocks(self) -> tuple[int, ...]:
        """Experts of each layer, 1 where it is dense, and of the blocks of multi-token prediction, which are numbered on from the last."""
        experts = self.moe.experts_per_layer(self.model.num_layers)
        return experts + experts[-1:] * self.model.mtp_num_layers

    # ------------------------------------------------------------ what a world size adds

    def layers_of_stages(self) -> Split:
        """The layers, from 1, of each pipeline stage; stage s is on pipeline rank s mod PP."""
        return layers_of_stages(self.parallel, self.model.num_layers)

    def data_parallel_size(self, world_size: int) -> int:
        return world_size // self.parallel.model_parallel_size

    def expert_degrees(self) -> list[int]:
        """Distinct expert-parallel degrees of the layers, the teacher's among them."""
        runs = [self, self.teacher()] if self.distillation.is_on else [self]
        experts = {(run.moe, n) for run in runs for n in run.moe.experts_per_layer(run.model.num_layers) if n > 1}
        return sorted({moe.expert_parallel_degree(n) for moe, n in experts})

    def global_batch_size(self, world_size: int) -> int:
        t = self.training
        return t.global_batch_size or t.micro_batch_size * (t.gradient_accumulation_steps or 1) * self.data_parallel_size(world_size)

    def num_microbatches(self, world_size: int) -> int:
        return self.global_batch_size(world_size) // (self.training.micro_batch_size * self.data_parallel_size(world_size))

    def world_problems(self, world_size: int) -> Iterator[str]:
        """What is wrong with running this on `world_size` ranks."""
        p = self.parallel
        if world_size % p.model_parallel_size and p.model_parallel_size > p.tensor_model_parallel_size:
            yield (f"the number of ranks ({world_size}) must be divisible by --tensor-model-parallel-size "
                   f"({p.tensor_model_parallel_size}) x --pipeline-model-parallel-size ({p.pipeline_model_parallel_size}) x "
                   f"--context-parallel-size ({p.context_parallel_size}) = {p.model_parallel_size}; make the product one of "
                   f"{_one_of(world_size)} or start another number of ranks")  # fmt: skip
            return
        if world_size % p.model_parallel_size:
            yield (f"the number of ranks ({world_size}) must be divisible by --tensor-model-parallel-size "
                   f"({p.tensor_model_parallel_size}); use TP {_one_of(world_size)} or start another number of ranks")  # fmt: skip
            return
        dp, micro, steps = self.data_parallel_size(world_size), self.training.micro_batch_size, self.training.gradient_accumulation_steps
        batch = self.global_batch_size(world_size)
        if steps and batch != micro * steps * dp:
            yield (f"--global-batch-size ({batch}) must be --micro-batch-size ({micro}) x --gradient-accumulation-steps ({steps}) x "
                   f"data-parallel size ({dp}) = {micro * steps * dp}; use {' or '.join(_batches_that_fit(batch, micro, steps, dp))}")  # fmt: skip
        elif batch % (micro * dp):
            unit = micro * dp
            below = batch // unit * unit
            yield (f"--global-batch-size ({batch}) must be divisible by --micro-batch-size ({micro}) x data-parallel size ({dp}) = "
                   f"{unit}; use {f'{below} or ' if below else ''}{below + unit}")  # fmt: skip
        else:
            what = f"--micro-batch-size ({micro}) x data-parallel size ({dp}) = {micro * dp}"
            ramp_problems = list(self._ramp_problems(batch, micro * dp, what))
            yield from ramp_problems
            if not ramp_problems:
                sizes = [phase.batch for phase in self.pace(world_size).phases]
                yield from microbatch_problems(p, self.model.num_layers, sizes, micro * dp)
        replicas, data_ranks = p.num_distributed_optimizer_instances, dp * p.context_parallel_size
        if data_ranks % replicas:
            yield (f"--num-distributed-optimizer-instances ({replicas}) must divide the {data_ranks} data ranks (data-parallel size {dp} x "
                   f"--context-parallel-size {p.context_parallel_size}); use one of {_one_of(data_ranks)}")  # fmt: skip
        try:
            degrees = self.expert_degrees()
        except ValueError:
            return  # said by problems()
        for ep in degrees:
            yield from self._expert_mesh_problems(world_size, ep)

    def _expert_mesh_problems(self, world_size: int, ep: int) -> Iterator[str]:
        """Of layers with this expert-parallel degree."""
        pp, etp = self.parallel.pipeline_model_parallel_size, self.parallel.etp
        stage = world_size // pp
        if stage % (ep * etp):
            ranks = f"the number of ranks ({world_size})" if pp == 1 else f"the number of ranks of a pipeline stage ({stage})"
            degree = f"the expert-parallel degree ({ep})"
            if etp > 1:
                degree += f" x the expert-tensor-parallel degree ({etp}) = {ep * etp}"
            option, legal = ("expert-tensor-parallel-size", stage) if stage % etp else ("moe-expert-parallel-size", stage // etp)
            yield f"{ranks} must be divisible by {degree}; set --{option} to one of {_one_of(legal)}"
        elif self.moe.moe_token_dispatcher == "fused" and (here := int(os.environ.get("LOCAL_WORLD_SIZE", world_size))) % ep:
            yield (f"--moe-token-dispatcher fused reaches the GPUs of one node, and {ep} ranks of an expert-parallel group do not share nodes of "
                   f"{here} ranks; set --moe-expert-parallel-size to one of {_one_of(here)}, or take --moe-token-dispatcher "
                   f"{'hierarchical' if ep % here == 0 and here > 1 else 'alltoall'}")  # fmt: skip
        elif self.moe.moe_token_dispatcher == "hierarchical":
            try:
                split_over_nodes(ep, etp, self.node_size(world_size))
            except ValueError as error:
                yield str(error)

    def node_size(self, world_size: int) -> int | None:
        """Ranks per node where rows may travel in two stages, None where they do not. Without anybody's word all ranks are on one node,
        and `auto` takes no two stages of nodes among which the ranks do not divide."""
        kind, given = self.moe.moe_token_dispatcher, self.moe.moe_node_size or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        if kind == "hierarchical":
            return given
        degrees, etp = self.expert_degrees(), self.parallel.etp
        return given if kind == "auto" and all(divides_over_nodes(ep, etp, given) for ep in degrees) else None

    def world_warnings(self, world_size: int) -> Iterator[str]:
        """What is allowed on so many ranks but probably not meant, of a run without `world_problems`."""
        sizes = [phase.batch for phase in self.pace(world_size).phases]
        unit = self.training.micro_batch_size * self.data_parallel_size(world_size)
        yield from microbatch_warnings(self.parallel, self.model.num_layers, sizes, unit)

    def _ramp_problems(self, batch: int, unit: int, what: str) -> Iterator[str]:
        """Every batch size of a ramp-up must split into micro-batches of all data ranks."""
        ramp = self.training.rampup_batch_size
        if ramp is None or len(ramp) != 3:
            return
        start, increment, _ = ramp
        for name, size in (("START", start), ("INCREMENT", increment)):
            if size % unit:
                below = size // unit * unit
                yield (f"{name} ({size}) of --rampup-batch-size must be divisible by {what}; use "
                       f"{f'{below} or ' if below else ''}{below + unit}")  # fmt: skip
        if start > batch:
            yield f"START ({start}) of --rampup-batch-size must not exceed the global batch size ({batch})"
        elif (batch - start) % increment:
            legal = [n for n in divisors(batch - start) if n % unit == 0]
            cure = f"use one of {', '.join(map(str, legal))}" if legal else "use another START"
            yield (f"the global batch size ({batch}) must be START ({start}) of --rampup-batch-size plus a multiple of INCREMENT "
                   f"({increment}); {cure}")  # fmt: skip

    def train_problems(self) -> Iterator[str]:
        """What is fine to look at but cannot be trained: what has no default is missing, as something to train on, an end, a vocabulary."""
        t = self.training
        if not (t.train_iters or t.train_samples or t.train_tokens):
            yield "how long to train is missing: give --train-iters, --train-samples or --train-tokens"
        if not self.data.is_given:
            yield "data is missing: give --data-path PREFIX (made by tools/preprocess_data.py) or --mock-data"
        if self.data.is_given and not self.data.mock_data and not self.tokenizer.kind and not self.model.vocab_size:
            yield ("the vocabulary is unknown: give the tokenizer (--tokenizer-model, or --vocab-file and --merge-file), "
                   "or --vocab-size")  # fmt: skip
        if self.tokenizer.kind == "NullTokenizer" and not self.model.vocab_size:
            yield "--tokenizer-type NullTokenizer needs --vocab-size"
        if self.distillation.is_on and not self.distillation.load_teacher:
            yield "the teacher is missing: give --load-teacher DIR, the run directory in which it was trained"

    def pace(self, world_size: int, start: Consumed = Consumed()) -> Pace:  # noqa: B008 - immutable
        """What each step takes, from `start` on."""
        full, seq_length, ramp = self.global_batch_size(world_size), self.training.seq_length, self.training.rampup_batch_size
        batch_size = RampUp(*ramp, full).batch_size if ramp else None
        curriculum = self.curriculum
        length = (lambda step: curriculum.length(step, seq_length)) if curriculum.curriculum_learning else None
        return Pace(full, curriculum.longest(seq_length), batch_size, length, start)

    def train_ends(self, world_size: int, start: Consumed = Consumed()) -> dict[str, int]:  # noqa: B008 - immutable
        """The iteration at which each of the given ends is reached by a run that is at `start`, by flag."""
        t, pace = self.training, self.pace(world_size, start)
        ends = {
            "--train-iters": t.train_iters,
            "--train-samples": pace.steps_until("samples", t.train_samples) if t.train_samples else None,
            "--train-tokens": pace.steps_until("tokens", t.train_tokens) if t.train_tokens else None,
        }
        return {name: steps for name, steps in ends.items() if steps is not None}

    def train_iterations(self, world_size: int, start: Consumed = Consumed()) -> int:  # noqa: B008 - immutable
        """The iteration at which the first of the given ends is reached."""
        return min(self.train_ends(world_size, start).values())

    def wanted_samples(self, world_size: int) -> tuple[int, int, int]:
        """How many samples of training, validation and test Megatron would order for this run.

        Its rules: --train-samples, else --train-iters global batches (also when --train-tokens ends the run earlier); new
        validation samples for every evaluation and for one more; test samples for one evaluation.
        """
        t, batch, pace = self.training, self.global_batch_size(world_size), self.pace(world_size)
        if t.train_samples:
            iterations = int(pace.iterations_at("samples", t.train_samples))
        else:
            iterations = t.train_iters or self.train_iterations(world_size)
        evaluations = iterations // t.eval_interval + 1 if t.eval_interval else 1
        return t.train_samples or pace.after(iterations).samples, evaluations * t.eval_iters * batch, t.eval_iters * batch

    # ------------------------------------------------------------ to and from JSON

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, groups: dict[str, dict[str, Any]]) -> RunConfig:
        """The inverse of `to_dict` after JSON, which turns tuples into lists; unknown keys of newer versions are left out."""
        values = {}
        for name, group in GROUPS.items():
            for s in fields_of(group):
                if s.name in groups.get(name, {}):
                    value = groups[name][s.name]
                    values[s.name] = tuple(value) if isinstance(value, list) else value
        return cls.from_values(values)

    def architecture(self, vocab_size: int) -> dict[str, Any]:
        """What weights depend on: two runs whose `architecture` is equal can exchange checkpoints."""
        m = dataclasses.asdict(self.model)
        for name in ("hidden_dropout", "attention_dropout", "init_method_std", "use_rotary_position_embeddings", "activation_func",
                     "squared_relu", "mtp_num_layers", "mtp_loss_scaling_factor"):  # fmt: skip
            del m[name]
        idle = {option[2:].replace("-", "_") for option in self.model.idle} | ({"add_qkv_bias"} if m["add_bias_linear"] else set())
        for name in _NEWER_FIELDS:  # named only where they do something
            if name in idle or m[name] == FIELDS[name].default:
                del m[name]
            elif isinstance(m[name], tuple):
                m[name] = list(m[name])  # as JSON has it
        m |= {
            "num_key_value_heads": self.model.key_value_heads, "kv_channels": self.model.head_dim,
            "ffn_hidden_size": self.model.ffn_size, "vocab_size": vocab_size,
            "padded_vocab_size": self.model.padded_vocab_size(vocab_size),
            "experts_per_layer": list(self.moe.experts_per_layer(self.model.num_layers)), "mlp_type": self.moe.mlp_type,
            "swiglu": self.model.activation == "swiglu",
        }  # fmt: skip
        return m | self._newer_architecture()

    def _newer_architecture(self) -> dict[str, Any]:
        """What is named only where it is used, so that the checkpoints written before it existed still are of this architecture."""
        newer: dict[str, Any] = {}
        if self.model.mtp_num_layers:
            newer["mtp_num_layers"] = self.model.mtp_num_layers
        if self.moe.moe_router_policy == "hash":
            newer["moe_router_hash_seed"] = self.moe.moe_router_hash_seed
        if self.moe.moe_router_enable_expert_bias:
            newer["moe_router_enable_expert_bias"] = True
        if self.model.activation not in ("gelu", "swiglu"):
            newer["activation_func"] = self.model.activation
        if self.moe.has_experts:
            for name in ("moe_residual_combine", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size", "moe_shared_expert_gate",
                         "moe_latent_size"):  # fmt: skip
                if getattr(self.moe, name) != FIELDS[name].default:
                    newer[name] = getattr(self.moe, name)
        if newer.get("moe_ffn_hidden_size") == self.model.ffn_size:
            del newer["moe_ffn_hidden_size"]
        return newer


# Fields of ModelConfig that came after the first checkpoints: at their defaults they describe the models of before.
_NEWER_FIELDS = (
    "rotary_percent", "rotary_interleaved", "rope_scaling_type", "rope_scaling_factor", "rope_original_max_position_embeddings",
    "rope_low_freq_factor", "rope_high_freq_factor", "rope_beta_fast", "rope_beta_slow", "rope_mscale", "rope_mscale_all_dim",
    "rope_yarn_truncate", "qk_layernorm", "qk_layernorm_scope", "window_size", "window_attn_skip_freq", "softmax_type",
    "multi_latent_attention", "q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim", "add_qkv_bias",
)  # fmt: skip

_OF_THE_TEACHER = r"--(num-layers|num-experts|hidden-size|num-attention-heads)(?![\w-])"


def digest(data: Any) -> str:
    """Short hex digest of JSON-like data, for cache keys and names."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _batches_that_fit(batch: int, micro: int, steps: int, dp: int) -> Iterator[str]:
    """One of the three sizes each, changed so that their product holds."""
    yield f"--global-batch-size {micro * steps * dp}"
    if batch % (micro * dp) == 0:
        yield f"--gradient-accumulation-steps {batch // (micro * dp)}"
    if batch % (steps * dp) == 0:
        yield f"--micro-batch-size {batch // (steps * dp)}"


def _one_of(n: int) -> str:
    return ", ".join(map(str, divisors(n)))
