"""The recipe: a plain model becomes a parallel one. The order is the content."""

from __future__ import annotations

import torch

from megatron_moe.config.run import RunConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import build_on_meta, initialize_parameters
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.module_experts import ExpertFactory
from megatron_moe.mpu.mesh import ParallelMesh, build_mesh
from megatron_moe.parallel.compile import apply_compile
from megatron_moe.parallel.expert import apply_expert_parallel, share_counts
from megatron_moe.parallel.pipeline import PipelinedGPT, stages_here
from megatron_moe.parallel.recompute import apply_recompute
from megatron_moe.parallel.tensor import apply_tensor_parallel
from megatron_moe.parallel.zero import apply_zero


def parallelize(model: GPT, mesh: ParallelMesh, config: RunConfig) -> None:
    """Apply every parallelism of `config` in place, on a model without memory (meta device) or with it."""
    # One rank has nothing to split or to sum; FSDP would keep every parameter twice, and copy gradients twice. In bf16 it casts.
    is_split = mesh.stage_ranks > 1 or config.training.bf16
    if is_split:
        apply_expert_parallel(model, mesh, config.moe.moe_token_dispatcher)  # edits parameters by name: before anything wraps them
    if mesh.size("tp") > 1:
        apply_tensor_parallel(model, mesh.dense["tp"])
    share_counts(model, mesh)
    if config.training.recompute:
        apply_recompute(model, config.training.recompute)  # inside the FSDP units: recomputation needs their parameters gathered
    if config.training.compile:
        apply_compile(model)
    if is_split:
        apply_zero(model, mesh, config.training.bf16)  # last: wraps whatever the blocks have become, and replaces the parameters


def build_parallel_mesh(config: RunConfig, device_type: str) -> ParallelMesh:
    """Collective: the process groups of this run, those of its teacher's experts among them."""
    p = config.parallel
    return build_mesh(
        device_type, p.tensor_model_parallel_size, config.expert_degrees(), p.zero_stage, p.pipeline_model_parallel_size,
        p.context_parallel_size, p.expert_tensor_parallel_size, p.num_distributed_optimizer_instances,
    )  # fmt: skip


def build_sharded_model(
    config: RunConfig, vocab_size: int, mesh: ParallelMesh, expert_factory: ExpertFactory | None = None
) -> GPT | PipelinedGPT:
    """The parallel model of this rank without memory: its shards have shapes and no content. Under pipeline parallelism, the stages
    that this rank holds: the others' layers never get memory."""
    if mesh.size("pp") == 1:
        model = build_plain_on_meta(config, vocab_size, expert_factory)
        parallelize(model, mesh, config)
        return model
    split, stages = config.layers_of_stages(), {}
    for number in stages_here(config, mesh):
        stages[number] = build_plain_on_meta(config, vocab_size, expert_factory)
        stages[number].keep_stage(split[number], is_first=number == 0, is_last=number == len(split) - 1)
        parallelize(stages[number], mesh, config)
    return PipelinedGPT(stages, len(split), mesh, config)


def build_plain_on_meta(config: RunConfig, vocab_size: int, expert_factory: ExpertFactory | None) -> GPT:
    dtype = torch.float64 if config.training.params_dtype == "float64" else torch.float32
    model = build_on_meta(lambda: GPT(config.model, config.moe, vocab_size, expert_factory), dtype)
    for moe in moe_layers(model):
        moe.experts.use_reference = config.training.moe_kernels == "reference"
    return model


def build_parallel_model(
    config: RunConfig, vocab_size: int, mesh: ParallelMesh, device: torch.device, expert_factory: ExpertFactory | None = None
) -> GPT | PipelinedGPT:
    """The sharded model with its initial weights; no rank ever holds more than its shards and one whole matrix.

    `expert_factory`: experts of your own, see moe/module_experts.py.
    """
    model = build_sharded_model(config, vocab_size, mesh, expert_factory)
    model.to_empty(device=device)
    initialize_parameters(
        model, config.training.seed, config.model.init_method_std, config.model.num_layers, config.moe.moe_identical_expert_init
    )
    return model
