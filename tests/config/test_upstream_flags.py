"""Every flag of the upstream MoE examples and tutorials is known, and is one of three things: a setting, without meaning, not built yet."""

import json

import pytest
from upstream_commands import ALL, EXAMPLES

from megatron_moe.arguments import build_parser, check_to_train, parse_args
from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.leftovers import LEFTOVERS, NEUTRAL, NOT_YET, SWITCHES
from megatron_moe.config.run import GROUPS

TINY = ["--preset", "tiny", "--mock-data"]

# Sorted by hand from upstream's own list, in its spelling.
SETTINGS = """
    num-experts mlp-type topk expert-interval moe-expert-parallel-size disable-moe-token-dropping moe-train-capacity-factor
    moe-eval-capacity-factor moe-min-capacity moe-loss-coeff disable-moe-top2-2nd-expert-sampling deepspeed_config deepscale_config
    zero-stage deepspeed-activation-checkpointing checkpoint-activations recompute-activations recompute-granularity adam-beta1 adam-beta2
    adam-eps tensor-model-parallel-size model-parallel-size sequence-parallel init-method-std lr-decay-tokens lr-decay-samples lr-decay-iters
    lr-warmup-tokens lr-warmup-fraction lr-warmup-iters lr-warmup-samples micro-batch-size exit-duration-in-mins exit-interval
    exit-signal-handler global-batch-size num-layers hidden-size ffn-hidden-size kv-channels num-attention-heads num-key-value-heads
    seq-length max-position-embeddings train-tokens train-iters train-samples lr min-lr lr-decay-style split log-interval eval-interval
    eval-iters save-interval weight-decay clip-grad num-workers load save tensorboard-queue-size tensorboard-dir vocab-file merge-file
    tokenizer-type tokenizer-model vocab-size data-path train-data-path valid-data-path test-data-path data-cache-path
    train-data-exact-num-epochs
    hidden-dropout attention-dropout layernorm-epsilon make-vocab-size-divisible-by seed finetune
    no-load-optim no-save-optim exit-on-missing-checkpoint kill-switch-file untie-embeddings-and-output-weights swiglu normalization
    use-rotary-position-embeddings rotary-position-embeddings-theta disable-bias-linear bf16 reset-position-ids reset-attention-mask
    eod-mask-loss distributed-backend sgd-momentum optimizer enable-expert-tensor-parallelism
    mos kd kd-alpha-ce kd-beta-ce kd-temp reset-iteration load-teacher num-layers-teacher num-experts-teacher hidden-size-teacher
    num-attention-heads-teacher rampup-batch-size start-weight-decay end-weight-decay weight-decay-incr-style
    fp16 hysteresis loss-scale initial-loss-scale min-loss-scale loss-scale-window cpu-optimizer
    pipeline-model-parallel-size num-layers-per-virtual-pipeline-stage enable-zbh1-pipeline
"""

WITHOUT_MEANING = """
    create-moe-param-group use-tutel ds-inference deepspeed deepscale zero-reduce-scatter zero-contigious-gradients
    zero-reduce-bucket-size zero-allgather-bucket-size remote-device use-pin-memory no-pipeline-parallel partition-activations
    contigious-checkpointing checkpoint-in-cpu synchronize-each-layer profile-backward checkpoint-num-layers
    distribute-checkpointed-activations recompute-method recompute-num-layers scattered-embeddings split-transformers
    memory-centric-tiled-linear tile-factor cpu_torch_adam ds_fused_adam repeated-dataloader override-opt_param-scheduler
    use-checkpoint-opt_param-scheduler use-checkpoint-args
    log-timers-to-tensorboard log-batch-size-to-tensorboard log-validation-ppl-to-tensorboard log-memory-to-tensorboard
    log-world-size-to-tensorboard log-optimizer-states-to-tensorboard data-impl dataloader-type no-load-rng no-save-rng no-load-lr-state
    timing-log-level timing-log-option local_rank trust-remote-code use-flash-attn use-flash-attn-v1 use-flash-attn-v2
    use-flash-attn-triton no-masked-softmax-fusion no-bias-gelu-fusion no-bias-dropout-fusion no-gradient-accumulation-fusion
    no-persist-layer-norm use-distributed-optimizer DDP-impl attention-softmax-in-fp32 accumulate-allreduce-grads-in-fp32
    no-query-key-layer-scaling use-cpu-initialization log-num-zeros-in-grad log-params-norm tensorboard-log-interval enable-zbh1-exact-semantics
"""

NOT_BUILT = """
    standalone-embedding-stage num-experts-switch inference skip-train
    load-tag universal-checkpoint ds-sequence-parallel-size force-ds-sequence-parallel
    ds-sequence-parallel-fpdt ds-sequence-parallel-fpdt-chunk-size ds-sequence-parallel-fpdt-offloading random-ltd
    data-efficiency-curriculum-learning return-data-index train-idx-path train-desc-path train-doc-idx-path
    train-sample-idx-path train-shuffle-idx-path wandb-project wandb-entity
    wandb-exp-name wandb-save-dir profile profile_steps profile-ranks
"""


def kind_of(name: str) -> str:
    """Which of the three a flag is, as a command line sees it."""
    option = f"--{name.replace('_', '-')}"
    action = next((a for a in build_parser("x")._actions if option in a.option_strings), None)
    assert action is not None, f"{option} is not known"
    if action.dest.startswith("_other_"):
        return "leftover" if option[2:] in LEFTOVERS else "not yet"
    return "setting"


def test_every_upstream_flag_is_a_setting_or_without_meaning_or_not_built_yet():
    lists = {"setting": SETTINGS.split(), "leftover": WITHOUT_MEANING.split(), "not yet": NOT_BUILT.split()}
    expected = {name: kind for kind, names in lists.items() for name in names}
    assert len(expected) == sum(map(len, lists.values()))
    assert {name: kind_of(name) for name in expected} == expected


def test_the_flags_of_the_commands_are_in_the_list():
    words = {w[2:] for launch in ALL.values() for w in launch.flags if w.startswith("--")}
    assert words <= {*SETTINGS.split(), *WITHOUT_MEANING.split(), *NOT_BUILT.split()}


@pytest.mark.parametrize("name", ALL)
def test_commands_parse_for_their_number_of_ranks_and_lack_only_what_is_not_built_yet(name, tmp_path, monkeypatch):
    launch = ALL[name]
    for file in ("ds_config.json", "ds_config_moe.json"):
        (tmp_path / file).write_text(json.dumps(launch.json))
    monkeypatch.chdir(tmp_path)
    parsed = parse_args(launch.flags)
    assert list(parsed.run.world_problems(launch.ranks)) == []
    assert parsed.run.training.fp16
    problems = []
    try:
        check_to_train(parsed, launch.ranks)
    except ConfigError as refused:
        problems = refused.problems
    rest = [p for p in problems if "not built yet" not in p]
    left_to_the_reader = name in ("experts-128", "falling-pyramid")
    assert bool(rest) == left_to_the_reader and all("is missing" in p or "vocabulary is unknown" in p for p in rest)


def test_what_the_examples_say_arrives():
    words = EXAMPLES["gpt-1.3b-pr-moe-64-128"].flags
    words.remove("--deepspeed_config")
    words.remove("ds_config.json")
    run = parse_args(words).run
    assert run.moe.num_experts == (64,) * 10 + (128,) * 2
    assert (run.moe.mlp_type, run.moe.moe_loss_coeff, run.optimizer.adam_beta2, run.training.recompute) == ("residual", 0.01, 0.95, "full")
    assert (run.optimizer.lr_decay_tokens, run.training.train_iters, run.data.split) == (300_000_000_000, 858306, "98,2,0")


# ---------------------------------------------------------------- values that ask for nothing


@pytest.mark.parametrize(
    "words",
    [
        "--num-experts 1",
        "--pipeline-model-parallel-size 1",
        "--ds-sequence-parallel-size 1",
        "--ds_sequence_parallel_size=1",
        "--rotary-percent 1.0",
        "--weight-decay-incr-style constant",
        "--kd-alpha-ce 1 --kd-beta-ce 2 --kd-temp 1.0 --num-layers-teacher 24 --num-experts-teacher 32 64 --load-teacher x",
        "--wandb-exp-name x --wandb-entity y",
        "--enable-expert-tensor-parallelism --sequence-parallel --tensor-model-parallel-size 1",
        "--expert-tensor-parallel-size 1",
        "--local_rank 3",
        "--local-rank=3",
        "--local_rank -1",
    ],
)
def test_a_value_that_asks_for_nothing_is_not_refused(words):
    parsed = parse_args([*TINY, *words.split()])
    check_to_train(parsed, 1)


@pytest.mark.parametrize(
    "words",
    [
        "--ds-sequence-parallel-size 2",
        "--ds-sequence-parallel-size",
        "--wandb-project x --wandb-exp-name y",
    ],
)
def test_a_value_that_asks_for_something_unbuilt_is_refused_by_every_flag(words):
    with pytest.raises(ConfigError) as refused:
        check_to_train(parse_args([*TINY, *words.split()]), 2)
    flags = [w for w in words.split() if w.startswith("--") and "tensor" not in w]
    assert [p.partition(":")[0] for p in refused.value.problems] == flags


def test_a_setting_of_a_feature_that_is_not_switched_on_warns():
    assert parse_args([*TINY, "--kd-beta-ce", "2"]).warnings == ["--kd-beta-ce has no effect: it is a setting of --mos and --kd"]
    assert parse_args([*TINY, "--wandb-entity", "x"]).warnings == ["--wandb-entity has no effect: it is a setting of --wandb-project"]


def test_the_tables_of_unbuilt_features_name_each_other_rightly():
    assert NEUTRAL.keys() | SWITCHES.keys() <= NOT_YET.keys()
    assert {s for switches in SWITCHES.values() for s in switches} <= NOT_YET.keys()
    assert all(s.option[2:] not in NOT_YET for g in GROUPS.values() for s in fields_of(g))


def test_yaml_may_switch_an_unbuilt_feature_off(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("random-ltd: false\nds-sequence-parallel-size: 1\n")
    check_to_train(parse_args([*TINY, "--config", str(file)]), 1)


# ---------------------------------------------------------------- the same flag twice


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lr 1 --lr 2", "--lr 1 and --lr 2 are both given: the last one counts"),
        ("--bf16 --no-bf16", "--bf16 and --no-bf16 are both given: the last one counts"),
        ("--topk=2 --moe-router-topk 1", "--topk 2 and --moe-router-topk 1 are both given: the last one counts"),
    ],
)
def test_two_values_for_one_setting_warn_with_both(words, said):
    assert parse_args([*TINY, *words.split()]).warnings == [said]


@pytest.mark.parametrize("words", ["--lr 1 --lr 1", "--checkpoint-activations --deepspeed-activation-checkpointing", "--lr 1 --lr=1"])
def test_one_value_given_twice_is_fine(words):
    assert parse_args([*TINY, *words.split()]).warnings == []
