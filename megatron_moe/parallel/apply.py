"""The recipe: a plain model becomes a parallel one. The order is the content."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_moe.config.run import RunConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.model.init import build_on_meta, initialize_parameters, store_in_half
from megatron_moe.moe.layer import moe_layers
from megatron_moe.moe.module_experts import ExpertFactory
from megatron_moe.mpu.mesh import ParallelMesh, build_mesh
from megatron_moe.parallel.compile import apply_compile
from megatron_moe.parallel.context import apply_context_parallel
from megatron_moe.parallel.expert import apply_expert_parallel, share_counts
from megatron_moe.parallel.fused import apply_fused_dispatch
from megatron_moe.parallel.half import apply_half, can_cast
from megatron_moe.parallel.offload import apply_activation_offload, is_offloaded, materialise
from megatron_moe.parallel.pipeline import PipelinedGPT, stages_here
from megatron_moe.parallel.recompute import apply_recompute
from megatron_moe.parallel.sequence import apply_sequence_parallel
from megatron_moe.parallel.tensor import apply_tensor_parallel
from megatron_moe.parallel.zero import apply_zero


def parallelize(model: GPT, mesh: ParallelMesh, config: RunConfig) -> None:
    """Apply every parallelism of `config` in place, on a model without memory (meta device) or with it."""
    half = getattr(torch, config.training.half) if config.training.half else None
    on_host = is_offloaded(config, mesh.dense.device_type)
    # One rank has nothing to split or to sum; FSDP would keep every parameter twice, and copy gradients twice. In 16 bits it casts,
    # but on a CPU something cheaper does.
    casts = half is not None and not on_host and config.moe.moe_token_dispatcher != "fused" and can_cast(model, mesh)
    is_split = mesh.stage_ranks > 1 or on_host or (half is not None and not casts)
    if is_split:
        apply_expert_parallel(model, mesh, config.moe.moe_token_dispatcher)  # edits parameters by name: before anything wraps them
        apply_fused_dispatch(model, mesh, config)
    if mesh.size("cp") > 1:
        apply_context_parallel(model, mesh.group("cp"), config.parallel.has_ring)
    if mesh.size("tp") > 1:
        apply_tensor_parallel(model, mesh.dense["tp"], config.parallel.sequence_parallel)
        if config.parallel.sequence_parallel:
            apply_sequence_parallel(model, mesh.dense["tp"])  # after context parallelism: it cuts what that leaves
    share_counts(model, mesh)
    apply_recompute(model, config.training.recomputed_modules)  # inside the FSDP units: it needs their parameters gathered
    if config.training.compile:
        apply_compile(model)
    if config.memory.cpu_offloading and mesh.dense.device_type != "cpu":
        apply_activation_offload(model)
    if is_split:
        # last: wraps whatever the blocks have become, and replaces the parameters
        apply_zero(model, mesh, half, on_host, torch.float16 if config.training.fp16_master_weights_and_grads else torch.float32)
    elif casts:
        apply_half(model, half)


def build_parallel_mesh(config: RunConfig, device_type: str) -> ParallelMesh:
    """Collective: the process groups of this run, those of its teacher's experts among them."""
    p = config.parallel
    return build_mesh(
        device_type, p.tensor_model_parallel_size, config.expert_degrees(), p.zero_stage, p.pipeline_model_parallel_size,
        p.context_parallel_size, p.etp, p.num_distributed_optimizer_instances, config.node_size(dist.get_world_size()),
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
    if config.training.fp16_master_weights_and_grads:
        store_in_half(model)
    model.loss_chunk_size = config.memory.cross_entropy_loss_chunk_size
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
    materialise(model, device, is_offloaded(config, device.type))
    initialize_parameters(
        model, config.training.seed, config.model.init_method_std, config.model.num_layers, config.moe.moe_identical_expert_init
    )
    return model
