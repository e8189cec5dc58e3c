"""Which layers are on which pipeline stage, in what order micro-batches go through them, and what that asks of a step. No torch.

A rank holds one stage, or several of them (virtual stages): stage s is on pipeline rank s mod PP. Worked example, 8 layers, PP 2,
two layers per virtual stage: stages [1 2] [3 4] [5 6] [7 8]; rank 0 holds layers 1 2 5 6, rank 1 holds 3 4 7 8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from megatron_moe.config.model import ModelConfig, divisors
from megatron_moe.config.parallel import ParallelConfig
from megatron_moe.config.training import TrainingConfig

Split = list[list[int]]  # the layers (from 1) of each stage

MAX_SPLIT_STAGES = 3  # per rank: with more of them torch frees gathered parameters between the two halves of a backward


def num_stages(p: ParallelConfig, num_layers: int) -> int:
    per_stage = p.num_layers_per_virtual_pipeline_stage
    return num_layers // per_stage if per_stage and p.pipeline_model_parallel_size > 1 else p.pipeline_model_parallel_size


def layers_of_stages(p: ParallelConfig, num_layers: int) -> Split:
    stages = num_stages(p, num_layers)
    outer = (p.decoder_first_pipeline_num_layers, p.decoder_last_pipeline_num_layers) if stages > 1 else ()
    return split_layers(num_layers, stages, *outer)


def schedule_of(p: ParallelConfig, num_layers: int) -> str:
    """gpipe, 1f1b, interleaved or zero-bubble."""
    if p.pipeline_schedule != "auto":
        return p.pipeline_schedule
    if p.enable_zbh1_pipeline:
        return "zero-bubble"
    return "interleaved" if num_stages(p, num_layers) > p.pipeline_model_parallel_size else "1f1b"


def rank_of_stage(stage: int, pp: int) -> int:
    return stage % pp


def stages_of_rank(rank: int, pp: int, stages: int) -> list[int]:
    return list(range(rank, stages, pp))


def split_layers(num_layers: int, stages: int, first: int | None = None, last: int | None = None) -> Split:
    """Consecutive layers to every stage, as evenly as can be; `first` and `last` say how many the outer stages get.

    Where they do not divide, the stages in the middle take one more, from the second on; then the first, which has the embedding;
    never the last, which has the logits. Worked example, 10 layers: 4 stages have 2 3 3 2, 3 stages 3 4 3, 6 stages 1 2 2 2 2 1.
    """
    given = {0: first, stages - 1: last}
    open_stages = [s for s in range(stages) if given.get(s) is None]
    left = num_layers - sum(n for n in given.values() if n is not None)
    sizes = [given.get(s) or 0 for s in range(stages)]
    if open_stages:
        each, more = divmod(left, len(open_stages))
        middle_first = sorted(open_stages, key=lambda s: (s == stages - 1, s == 0, s))
        for place, s in enumerate(middle_first):
            sizes[s] = each + (place < more)
    ends = [sum(sizes[: s + 1]) for s in range(stages)]
    return [list(range(end - size + 1, end + 1)) for size, end in zip(sizes, ends)]


# ---------------------------------------------------------------- micro-batches


def rounds(microbatches: int, pp: int) -> int:
    """The schedules of virtual stages, and zero-bubble, walk the micro-batches of a step in rounds of about PP."""
    return max(1, microbatches // pp)


def fits_rounds(microbatches: int, pp: int) -> bool:
    """Rounds must be of the same size. Any number below 2 PP is one round."""
    return microbatches % rounds(microbatches, pp) == 0


def nearest_that_fit(microbatches: int, pp: int) -> list[int]:
    """The numbers of micro-batches next to this one, below and above, that such a schedule can take."""
    below = next(n for n in range(microbatches, 0, -1) if fits_rounds(n, pp))
    above = next(n for n in range(microbatches, microbatches + pp + 1) if fits_rounds(n, pp))
    return sorted({below, above})


def microbatch_problems(p: ParallelConfig, num_layers: int, batches: Iterable[int], unit: int) -> Iterator[str]:
    """`batches`: sizes of the steps, in sequences; `unit`: sequences of a micro-batch of all data ranks."""
    pp, schedule = p.pipeline_model_parallel_size, schedule_of(p, num_layers)
    if pp == 1 or schedule not in ("interleaved", "zero-bubble"):
        return
    for batch in sorted(set(batches)):
        n = batch // unit
        if not fits_rounds(n, pp):
            near = " or ".join(str(m * unit) for m in nearest_that_fit(n, pp))
            yield (f"a step of {batch} sequences is {n} micro-batches, which the {schedule} schedule of PP {pp} walks in "
                   f"{rounds(n, pp)} rounds of the same size; use a multiple of {pp * unit} sequences, the nearest that fit are {near}")  # fmt: skip


def idle_share(p: ParallelConfig, num_layers: int, microbatches: int) -> float:
    """Of a step, as long as all stages take the same time: forwards and backwards of PP - 1 stages are waited for, and stages are
    shorter where a rank has several. Zero-bubble fills a part of it."""
    pp = p.pipeline_model_parallel_size
    waited = (pp - 1) * pp / num_stages(p, num_layers)
    return waited / (waited + microbatches)


def microbatch_warnings(p: ParallelConfig, num_layers: int, batches: Iterable[int], unit: int) -> Iterator[str]:
    pp, fewest = p.pipeline_model_parallel_size, min(batches) // unit
    if 0 < fewest < pp:
        idle = idle_share(p, num_layers, fewest)
        yield (f"{fewest} micro-batch(es) per step are fewer than the {pp} pipeline ranks, which are idle {idle:.0%} of a step; raise "
               f"--global-batch-size or --gradient-accumulation-steps")  # fmt: skip


# ---------------------------------------------------------------- what does not go together


def pipeline_problems(p: ParallelConfig, model: ModelConfig, training: TrainingConfig, is_distilling: bool) -> Iterator[str]:
    pp, layers = p.pipeline_model_parallel_size, model.num_layers
    if pp == 1:
        return
    cut = list(_split_problems(p, layers))
    yield from cut
    if is_distilling:
        yield (f"--pipeline-model-parallel-size must be 1, not {pp}, with --mos or --kd: the teacher has other layers than the student, "
               f"and its logits would have to wait on the last stage for all micro-batches of a step; use TP, EP or ZeRO 3")  # fmt: skip
    if p.enable_zbh1_pipeline and p.pipeline_schedule not in ("auto", "zero-bubble"):
        yield f"--enable-zbh1-pipeline is --pipeline-schedule zero-bubble, not {p.pipeline_schedule}; leave one of them out"
    if cut:
        return
    schedule, per_rank = schedule_of(p, layers), num_stages(p, layers) // pp
    if schedule == "interleaved" and per_rank == 1:
        yield (f"--pipeline-schedule interleaved needs several stages on each rank: give --num-layers-per-virtual-pipeline-stage, "
               f"one of {_listed(divisors(layers // pp)[:-1]) or '(none: a rank has one layer)'}")  # fmt: skip
    if schedule in ("gpipe", "1f1b") and per_rank > 1:
        yield (f"--pipeline-schedule {schedule} has one stage on each rank, and --num-layers-per-virtual-pipeline-stage "
               f"({p.num_layers_per_virtual_pipeline_stage}) makes {per_rank}; use interleaved or zero-bubble, or leave it out")  # fmt: skip
    if schedule == "zero-bubble":
        yield from _zero_bubble_problems(p, model, training, per_rank)


def _zero_bubble_problems(p: ParallelConfig, model: ModelConfig, training: TrainingConfig, per_rank: int) -> Iterator[str]:
    if model.mtp_num_layers:
        yield (f"--mtp-num-layers ({model.mtp_num_layers}) does not go with the zero-bubble schedule: torch splits the backward of the last "
               "stage by what its input leads to, and would walk what the model and the modules share twice; use --pipeline-schedule 1f1b, "
               "or interleaved")  # fmt: skip
    if p.zero_stage == 3:
        yield ("--zero-stage 3 does not go with the zero-bubble schedule: torch splits the backward over parameters that stage 3 has "
               "freed, and gradients would be lost; use --zero-stage 2, or --pipeline-schedule 1f1b")  # fmt: skip
    if training.compile:
        yield ("--compile does not go with the zero-bubble schedule: torch cannot split the backward of a compiled region; leave it out, "
               "or use --pipeline-schedule 1f1b")  # fmt: skip
    if per_rank > MAX_SPLIT_STAGES:
        yield (f"the zero-bubble schedule takes at most {MAX_SPLIT_STAGES} stages on a rank, not {per_rank}: with more of them torch frees "
               f"parameters between the halves of a backward; raise --num-layers-per-virtual-pipeline-stage "
               f"({p.num_layers_per_virtual_pipeline_stage})")  # fmt: skip


def pipeline_warnings(p: ParallelConfig) -> Iterator[str]:
    pp = p.pipeline_model_parallel_size
    if pp == 1:
        given = {
            "--num-layers-per-virtual-pipeline-stage": p.num_layers_per_virtual_pipeline_stage,
            "--decoder-first-pipeline-num-layers": p.decoder_first_pipeline_num_layers,
            "--decoder-last-pipeline-num-layers": p.decoder_last_pipeline_num_layers,
            "--enable-zbh1-pipeline": p.enable_zbh1_pipeline,
            f"--pipeline-schedule {p.pipeline_schedule}": p.pipeline_schedule != "auto",
        }
        yield from (f"{name} has no effect with --pipeline-model-parallel-size 1" for name, value in given.items() if value)
    elif p.zero_stage >= 2:
        freed = ", and parameters stay gathered from a backward to the next forward" if p.zero_stage == 3 else ""
        yield (f"--zero-stage {p.zero_stage} saves less memory with --pipeline-model-parallel-size {pp}: torch reduces the gradients of a "
               f"stage after its last micro-batch, so whole gradients are kept until then, as in stage 1{freed}")  # fmt: skip


def _split_problems(p: ParallelConfig, num_layers: int) -> Iterator[str]:
    """Why these layers cannot be cut that way."""
    pp, per_stage = p.pipeline_model_parallel_size, p.num_layers_per_virtual_pipeline_stage
    outer = {
        "--decoder-first-pipeline-num-layers": p.decoder_first_pipeline_num_layers,
        "--decoder-last-pipeline-num-layers": p.decoder_last_pipeline_num_layers,
    }
    given = {name: n for name, n in outer.items() if n is not None}
    if num_layers < pp:
        yield (f"--pipeline-model-parallel-size ({pp}) needs a layer for each stage and --num-layers is {num_layers}; use PP "
               f"{_nearest_degrees(num_layers, pp)}, or more layers")  # fmt: skip
        return
    if per_stage is not None:
        yield from _virtual_problems(num_layers, pp, per_stage, bool(given))
        return
    left, others = num_layers - sum(given.values()), pp - len(given)
    said = " and ".join(f"{name} ({n})" for name, n in given.items())
    if given and others and left < others:
        yield (f"{said} leave {max(left, 0)} of --num-layers ({num_layers}) to {others} further stage(s), which need a layer each; "
               f"give away {num_layers - others} or less")  # fmt: skip
    elif given and not others and left:
        yield f"{said} are all stages and must add up to --num-layers ({num_layers}); leave one of them out"


def _virtual_problems(num_layers: int, pp: int, per_stage: int, is_uneven: bool) -> Iterator[str]:
    if num_layers % pp:
        yield (f"--num-layers-per-virtual-pipeline-stage needs --num-layers ({num_layers}) to be divisible by "
               f"--pipeline-model-parallel-size ({pp}); use PP {_listed(divisors(num_layers))}, or leave it out")  # fmt: skip
    elif num_layers // pp % per_stage:
        yield (f"--num-layers-per-virtual-pipeline-stage ({per_stage}) must divide the {num_layers // pp} layers of a rank "
               f"(--num-layers {num_layers} / PP {pp}); use {_listed(divisors(num_layers // pp))}")  # fmt: skip
    if is_uneven:
        yield ("--num-layers-per-virtual-pipeline-stage makes all stages alike: leave out --decoder-first-pipeline-num-layers and "
               "--decoder-last-pipeline-num-layers")  # fmt: skip


def _nearest_degrees(num_layers: int, pp: int) -> str:
    """The largest degree that has the layers; and, to keep the other degrees, the largest one that divides this one."""
    dividing = max(n for n in divisors(pp) if n <= num_layers)
    return f"{num_layers} or less" + (f" ({dividing} divides {pp})" if dividing != num_layers else "")


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
