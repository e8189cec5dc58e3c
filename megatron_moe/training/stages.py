"""What each pipeline stage holds and computes, counted from the configuration: for the plan, and for the first lines of a run."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_moe.config.pipeline import idle_share, rank_of_stage, schedule_of
from megatron_moe.config.run import RunConfig
from megatron_moe.model.flops import layer_flops, logit_flops, mtp_flops, parameter_counts


@dataclass(frozen=True)
class Stage:
    """`parts`: what it has beside its layers. `parameters`: with those of a tied copy, which the whole model counts once."""

    number: int
    rank: int  # in the pipeline
    layers: list[int]
    parts: list[str]
    moe_layers: int
    parameters: int
    flops_per_token: float


def stages_of(run: RunConfig, vocab_size: int) -> list[Stage]:
    """All stages in order; without a pipeline the whole model is one."""
    split, experts = run.layers_of_stages(), run.moe.experts_per_layer(run.model.num_layers)
    counts = parameter_counts(run.model, run.moe, vocab_size)
    token_vectors = run.model.padded_vocab_size(vocab_size) * run.model.hidden_size
    logits = logit_flops(run.model, vocab_size) + mtp_flops(run.model, run.moe, run.training.seq_length, vocab_size)
    mtp_experts = run.model.mtp_num_layers * (experts[-1] > 1)
    stages = []
    for number, layers in enumerate(split):
        is_first, is_last = number == 0, number == len(split) - 1
        parts = {"embedding": token_vectors, "positions": counts.embedding - token_vectors} if is_first else {}
        if is_last:
            parts |= {"norm": counts.final_norm, "head": counts.head}
            if not is_first and run.model.is_tied:
                parts["tied_logits"] = token_vectors
            elif not is_first and run.model.embeds_at_end:
                parts["embedding_of_mtp"] = token_vectors
            parts["mtp"] = counts.mtp
        here = [experts[layer - 1] for layer in layers]
        flops = sum(
            layer_flops(run.model, run.moe, n, run.training.seq_length, run.model.window_of(layer)) for layer, n in zip(layers, here)
        )
        stages.append(
            Stage(
                number, rank_of_stage(number, run.parallel.pipeline_model_parallel_size), layers, [p for p, n in parts.items() if n],
                sum(n > 1 for n in here) + (mtp_experts if is_last else 0), sum(counts.per_layer[layer - 1].total for layer in layers) + sum(parts.values()),
                flops + (logits if is_last else 0.0),
            )
        )  # fmt: skip
    return stages


def idle_of(run: RunConfig, microbatches: int) -> float:
    return idle_share(run.parallel, run.model.num_layers, microbatches)


def schedule_name(run: RunConfig) -> str:
    return schedule_of(run.parallel, run.model.num_layers)


def layer_ranges(layers: list[int]) -> str:
    """[1, 2, 3] -> 1-3"""
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
