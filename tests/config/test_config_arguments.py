"""From words on a command line to a RunConfig: spellings, precedence, and every mistake said at once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_moe.arguments import build_parser, check_to_train, parse_args, report_and_exit
from megatron_moe.config.flags import ConfigError, fields_of
from megatron_moe.config.leftovers import LEFTOVERS, NOT_YET
from megatron_moe.config.run import GROUPS, RunConfig

ROOT = Path(__file__).resolve().parents[2]
TINY = ["--preset", "tiny", "--mock-data"]


def run_of(*words) -> RunConfig:
    return parse_args(words).run


def problems_of(*words, world=None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_to_train(parse_args(words), world or 1)
    return caught.value.problems


def the_problem(*words, world=None) -> str:
    (problem,) = problems_of(*words, world=world)
    return problem


# ---------------------------------------------------------------- spellings


@pytest.mark.parametrize("words", [["4", "4", "8", "8"], ["[4, 4, 8, 8]"], ["[4,", "4,", "8,", "8]"], ["4,4,8,8"], ["4, 4, 8, 8"]])
def test_experts_of_a_pyramid_are_read_in_every_spelling(words):
    assert run_of("--num-layers", "8", "--num-experts", *words).moe.num_experts == (4, 4, 8, 8)


def test_one_expert_count_serves_all_moe_layers():
    run = run_of("--num-layers", "6", "--num-experts", "8")
    assert run.moe.experts_per_layer(6) == (1, 8, 1, 8, 1, 8)


def test_a_shorter_list_is_repeated_in_blocks():
    assert run_of("--num-layers", "8", "--num-experts", "4", "8").moe.experts_per_layer(8) == (1, 4, 1, 4, 1, 8, 1, 8)
    assert run_of("--num-layers", "4", "--expert-interval", "1", "--num-experts", "1", "8").moe.experts_per_layer(4) == (1, 1, 8, 8)


@pytest.mark.parametrize("words", [["[4,"], ["4.5"], ["[[4]]"], ["[true]"], ["four"], ["{}"]])
def test_experts_that_are_not_whole_numbers_are_refused_with_examples(words):
    assert "--num-experts: wants whole numbers such as 8, 4 4 8 8 or [4, 4, 8, 8]" in the_problem("--num-experts", *words)


def test_underscores_and_dashes_are_the_same():
    words = ["--num_layers", "6", "--hidden_size=96", "--no_moe_rts", "--moe-train_capacity-factor", "1.5"]
    run = run_of(*words)
    assert (run.model.num_layers, run.model.hidden_size, run.moe.moe_rts, run.moe.moe_train_capacity_factor) == (6, 96, False, 1.5)


def test_underscores_in_values_stay():
    assert run_of("--save", "my_run", "--data-path=a_b").checkpoint.save == "my_run"


@pytest.mark.parametrize(
    ("flag", "group", "name"),
    [
        ("--disable-moe-token-dropping", "moe", "moe_token_dropping"),
        ("--no-moe-token-dropping", "moe", "moe_token_dropping"),
        ("--disable-moe-top2-2nd-expert-sampling", "moe", "moe_top2_2nd_expert_sampling"),
        ("--disable-bias-linear", "model", "add_bias_linear"),
    ],
)
def test_negative_spellings_switch_off_what_is_on(flag, group, name):
    assert getattr(getattr(run_of(), group), name) is True
    assert getattr(getattr(run_of(flag), group), name) is False


def test_a_negative_flag_has_a_positive_opposite():
    assert run_of("--no-load-optim", "--load-optim").checkpoint.no_load_optim is False


@pytest.mark.parametrize(
    ("words", "group", "name", "value"),
    [
        (["--model-parallel-size", "2"], "parallel", "tensor_model_parallel_size", 2),
        (["--num-query-groups", "3"], "model", "num_key_value_heads", 3),
        (["--expert-model-parallel-size", "2", "--num-experts", "4"], "moe", "moe_expert_parallel_size", 2),
        (["--moe-router-topk", "2", "--num-experts", "4"], "moe", "topk", 2),
        (["--checkpoint-activations"], "training", "recompute", "full"),
        (["--deepspeed-activation-checkpointing"], "training", "recompute", "full"),
        (["--use-rotary-position-embeddings"], "model", "position_embedding_type", "rope"),
        (["--normalization", "rmsnorm"], "model", "normalization", "RMSNorm"),
        (["--rotary-position-embeddings-theta", "500000"], "model", "rotary_base", 5e5),
        (["--tokenizer-type", "GPTSentencePieceTokenizer", "--tokenizer-model", "x"], "tokenizer", "kind", "SentencePieceTokenizer"),
        (["--lr", "3.0e-4"], "optimizer", "lr", 3e-4),
        (["--train-tokens", "3e11"], "training", "train_tokens", 300_000_000_000),
    ],
)
def test_upstream_names_and_number_forms_mean_the_same(words, group, name, value):
    assert getattr(getattr(run_of(*words), group), name) == value


# ---------------------------------------------------------------- precedence


def test_command_line_wins_over_yaml_which_wins_over_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("hidden-size: 64\nlr: 0.5\nmin_lr: 0.1\nnum_experts: [2, 4]\nmock-data: true\ndisable-moe-token-dropping: false\n")
    run = run_of("--preset", "tiny", "--config", str(file), "--lr", "0.25")
    assert run.optimizer.lr == 0.25
    assert (run.model.hidden_size, run.optimizer.min_lr, run.moe.num_experts) == (64, 0.1, (2, 4))
    assert run.moe.moe_token_dropping
    assert (run.model.num_layers, run.moe.mlp_type) == (4, "residual")


def test_position_on_the_command_line_does_not_matter():
    assert run_of("--lr", "0.25", "--preset", "tiny") == run_of("--preset", "tiny", "--lr", "0.25")


def test_a_length_in_another_unit_replaces_the_one_of_a_weaker_source(tmp_path):
    run = run_of("--preset", "tiny", "--lr-warmup-tokens", "100", "--train-samples", "64")
    assert (run.optimizer.lr_warmup_tokens, run.optimizer.lr_warmup_fraction) == (100, None)
    assert (run.training.train_samples, run.training.train_iters) == (64, None)
    file = tmp_path / "run.yaml"
    file.write_text("lr_decay_tokens: 1000\n")
    assert run_of("--config", str(file), "--lr-decay-iters", "10").optimizer.lr_decay_tokens is None


def test_one_source_may_give_a_length_in_one_unit_only():
    assert "--lr-decay-iters and --lr-decay-tokens" in the_problem(*TINY, "--lr-decay-iters", "5", "--lr-decay-tokens", "5")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hiden_size: 64", "unknown setting 'hiden_size'; did you mean 'hidden-size'?"),
        ("- 1", "wants NAME: VALUE lines, not list"),
        ("lr: [", "cannot be read"),
        ("lr:", "--lr wants a value"),
        ("lr: 2020-01-01", "--lr wants a number"),
        ("bf16: 3", "--bf16 wants true or false, not 3"),
        ("topk: {a: 1}", "--topk wants a whole number"),
        ("weight_decay: .nan", "--weight-decay must be a finite number"),
    ],
)
def test_mistakes_in_yaml_are_said_beside_those_of_the_command_line(tmp_path, text, said):
    file = tmp_path / "run.yaml"
    file.write_text(text + "\n")
    problems = problems_of("--config", str(file), "--num-layers", "x")
    assert any(said in p for p in problems)
    assert any("--num-layers wants a whole number, not 'x'" in p for p in problems)


def test_a_file_of_settings_that_is_not_there_is_said_with_the_other_mistakes_and_noted_in_a_dry_run(tmp_path):
    file = str(tmp_path / "none.yaml")
    assert len(problems_of(*TINY, "--config", file, "--topk", "x")) == 2
    assert [m.path for m in parse_args([*TINY, "--config", file, "--dry-run"]).missing] == [file]
    assert "--topk" in the_problem(*TINY, "--config", file, "--topk", "x", "--dry-run")


def test_yaml_that_is_not_text_or_not_there_is_a_clear_mistake(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_bytes(b"lr: \xff\xfe")
    assert "cannot be read" in the_problem(*TINY, "--config", str(file))
    assert "cannot be read" in the_problem(*TINY, "--config", str(tmp_path / "none.yaml"))
    assert the_problem(*TINY, "--config") == "--config wants a value"


def test_leftovers_in_yaml_warn_as_on_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("use-tutel: true\n")
    assert [w.split()[0] for w in parse_args(["--config", str(file)]).warnings] == ["--use-tutel"]


# ---------------------------------------------------------------- mistakes


def test_an_unknown_flag_gets_a_near_miss_and_its_value_is_no_second_mistake():
    assert the_problem(*TINY, "--hiden-size", "64") == "unknown flag --hiden-size; did you mean --hidden-size?"
    assert the_problem(*TINY, "--qqq") == "unknown flag --qqq; --help lists them all"


def test_abbreviations_are_not_guessed():
    assert "unknown flag --num-lay" in the_problem(*TINY, "--num-lay", "4")


def test_an_unknown_choice_gets_a_near_miss():
    assert "did you mean 'residual'" in the_problem(*TINY, "--mlp-type", "residul")
    assert "use one of tiny" in the_problem("--preset", "big", *TINY[2:], "--mock-data", "--train-iters", "1")
    for near in ("gpt-350m-moe128", "GPT_350M_MoE_128", "350m-moe-128"):
        assert "did you mean 'gpt-350m-moe-128'?" in the_problem("--preset", near, "--mock-data", "--train-iters", "1")


def test_all_problems_of_all_groups_are_said_at_once():
    problems = problems_of(
        "--nonsense", "--topk", "x", "--lr", "-1e-3", "--min-lr", "inf", "--num-layers", "0", "--seq-length", "--bf16=1", "stray",
        "--preset", "none", "--micro-batch-size",
    )  # fmt: skip
    for part in (
        "unknown flag --nonsense",
        "--topk wants a whole number",
        "--lr must be greater than 0",
        "--min-lr must be a finite number",
        "--num-layers must be at least 1, not 0",
        "--seq-length wants a value",
        "--bf16 is a switch and takes no value",
        "--preset 'none'",
        "--micro-batch-size wants a value",
    ):
        assert any(part in p for p in problems), part


def test_problems_across_groups_are_said_beside_those_inside_one():
    problems = problems_of(*TINY, "--min-lr", "1", "--seq-length", "256")
    assert len(problems) == 2


def test_report_exits_with_code_2_and_one_message(capsys):
    with pytest.raises(SystemExit) as stopped:
        report_and_exit(["a is wrong", "b is wrong", "a is wrong"], rank=0)
    assert stopped.value.code == 2
    assert capsys.readouterr().err.splitlines()[0].endswith("2 problems with this command")


@pytest.mark.parametrize(
    ("words", "world", "parts"),
    [
        (["--num-experts", "6", "--moe-expert-parallel-size", "4"], 1, ["(6)", "(4)", "EP 1, 2, 3, 6, 12, 24", "--moe-pyramid-ep auto"]),
        (["--num-layers", "8", "--num-experts", "4", "4", "8"], 1, ["3 entries", "make 4 MoE layers", "1, 2 or 4 entries"]),
        (["--num-experts", "8", "--expert-interval", "9"], 1, ["0 MoE layers", "lower --expert-interval"]),
        (["--num-experts", "4", "--topk", "5"], 1, ["--topk (5)", "(4)"]),
        (["--num-experts", "4", "--topk", "2", "--moe-noisy-gate-policy", "RSample"], 1, ["--topk 1 only, not 2", "Jitter"]),
        (["--moe-expert-parallel-size", "4"], 2, ["ranks (2)", "expert-parallel degree (4)", "1, 2"]),
        (["--tensor-model-parallel-size", "2"], 3, ["ranks (3)", "(2)", "1, 3"]),
        (["--global-batch-size", "10"], 2, ["(10)", "(4)", "(2) = 8", "use 8 or 16"]),
        (["--global-batch-size", "8"], 4, ["= 16; use 16"]),
        (["--num-attention-heads", "6", "--hidden-size", "96", "--tensor-model-parallel-size", "4", "--global-batch-size", "4"], 4, ["(6)", "(4)", "TP 1, 2, 3, 6"]),
        (["--num-attention-heads", "6", "--num-key-value-heads", "3", "--hidden-size", "96", "--tensor-model-parallel-size", "2"], 2, ["--num-key-value-heads (3)", "TP 1, 3, 6"]),
        (["--num-key-value-heads", "3"], 1, ["--num-key-value-heads (3)", "1, 2, 4"]),
        (["--hidden-size", "130"], 1, ["(130)", "(4)", "--kv-channels"]),
        (["--seq-length", "256"], 1, ["(256)", "(128)", "raise the latter"]),
        (["--tensor-model-parallel-size", "2", "--ffn-hidden-size", "33"], 2, ["(33)", "(2)"]),
        (["--pipeline-model-parallel-size", "8"], 8, ["(8) needs a layer for each stage", "--num-layers is 4", "use PP 4"]),
        (["--data-path", "x"], 1, ["--mock-data and a data path exclude each other"]),
        (["--split", "a,b"], 1, ["--split wants up to three numbers"]),
        (["--bf16", "--params-dtype", "float64"], 1, ["exclude each other"]),
        (["--min-lr", "1"], 1, ["--min-lr (1)", "--lr (0.003)"]),
        (["--tokenizer-type", "NullTokenizer"], 1, ["NullTokenizer needs --vocab-size"]),
        (["--ckpt-step", "5"], 1, ["--ckpt-step (5) needs --load DIR"]),
    ],
)  # fmt: skip
def test_bad_input_names_the_rule_the_values_and_the_remedy(words, world, parts):
    problem = the_problem(*TINY, *words, world=world)
    for part in parts:
        assert part in problem


def test_auto_takes_the_largest_common_divisor_of_experts_and_ep():
    run = run_of("--num-layers", "4", "--num-experts", "6", "4", "--moe-expert-parallel-size", "4", "--moe-pyramid-ep", "auto")
    assert [run.moe.expert_parallel_degree(n) for n in (6, 4)] == [2, 4]


def test_a_layer_with_fewer_experts_than_ep_uses_that_many():
    run = run_of("--num-layers", "4", "--num-experts", "32", "64", "--moe-expert-parallel-size", "64")
    assert [run.moe.expert_parallel_degree(n) for n in (32, 64)] == [32, 64]


def test_missing_end_and_data_are_asked_for():
    problems = problems_of("--num-layers", "2")
    assert any("give --train-iters, --train-samples or --train-tokens" in p for p in problems)
    assert any("--data-path PREFIX" in p and "--mock-data" in p for p in problems)


# ---------------------------------------------------------------- upstream flags


def test_leftovers_warn_and_change_nothing():
    parsed = parse_args([*TINY, "--deepspeed", "--hysteresis", "2", "--no-pipeline-parallel", "--use-tutel"])
    assert parsed.run == run_of(*TINY)
    assert sorted(w.split()[0] for w in parsed.warnings) == ["--deepspeed", "--hysteresis", "--no-pipeline-parallel", "--use-tutel"]
    check_to_train(parsed, 1)


def test_flags_of_unbuilt_features_parse_and_are_refused_when_training():
    words = [*TINY, "--wandb-project", "a", "--profile-ranks", "0", "1", "--profile", "2", "--random-ltd"]
    problems = problems_of(*words)
    for name in ("--wandb-project", "--profile-ranks", "--random-ltd"):
        assert any(p.startswith(f"{name}: ") and "not built yet" in p for p in problems)


def test_no_upstream_flag_is_declared_twice():
    ours = {o[2:] for g in GROUPS.values() for s in fields_of(g) for o in (s.options + (s.negative_options if s.kind is bool else []))}
    assert not ours & LEFTOVERS.keys()
    assert not ours & NOT_YET.keys()
    assert not LEFTOVERS.keys() & NOT_YET.keys()


def test_settings_that_have_no_effect_or_are_probably_not_meant_warn():
    warnings = parse_args(["--num-layers", "8", "--num-experts", "[128, 64, 32, 16]", "--save-interval", "5000"]).warnings
    assert len(warnings) == 2
    assert "--save-interval (5000) has no effect without --save DIR" in warnings
    assert "falls with depth (128 64 32 16)" in warnings[1]
    warnings = parse_args(["--async-save", "--save-interval-minutes", "2.5", "--keep-every", "100"]).warnings
    assert [w.partition(" has no effect")[0] for w in warnings] == ["--save-interval-minutes (2.5)", "--async-save", "--keep-every (100)"]
    assert parse_args(["--save", "runs/a", "--keep-every", "100", "--save-best", "--eval-iters", "0"]).warnings == [
        "--keep-every (100) has no effect without --keep-last: every checkpoint is kept",
        "--save-best has no effect with --eval-iters 0: nothing is evaluated",
    ]


# ---------------------------------------------------------------- speed, help, round trip


def test_parsing_and_help_do_not_load_torch():
    program = (
        "import sys, time\n"
        "from megatron_moe.arguments import parse_args\n"
        "parse_args(['--preset', 'tiny'])\n"
        "try:\n    parse_args(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
        "print('CPU seconds', time.process_time())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    *text, last = done.stdout.splitlines()
    assert any("--moe-expert-parallel-size" in line for line in text)
    assert float(last.split()[-1]) < 2.0  # 0.2 here; CPU time, so a busy machine does not matter


def test_help_shows_each_flag_once_with_its_default():
    text = build_parser("x").format_help()
    for part in ("--num-experts N ...", "--lr FLOAT", "(default: 0.001)", "--disable-moe-token-dropping", "default: on"):
        assert part in text
    assert "--use-tutel" not in text


def test_a_run_survives_json():
    run = run_of(*TINY, "--num-experts", "4", "8", "--data-cache-path", "x")
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run


def test_keys_of_newer_versions_are_left_out():
    groups = run_of(*TINY).to_dict()
    groups["moe"]["from_the_future"] = 1
    groups["future_group"] = {}
    assert RunConfig.from_dict(groups) == run_of(*TINY)


# ---------------------------------------------------------------- any command line at all

NUMBERS = st.integers(-3, 70).map(str) | st.sampled_from(["", "1e3", "-1e-3", "nan", "inf", "1.5", "[2, 4]", "4,8", "x", "None", "true"])


@st.composite
def options(draw):
    spec = draw(st.sampled_from([s for g in GROUPS.values() for s in fields_of(g)]))
    option = draw(st.sampled_from(spec.options + (spec.negative_options if spec.kind is bool else [])))
    if spec.kind is bool:
        return [option]
    words = NUMBERS | (st.sampled_from([str(c) for c in spec.choices]) if spec.choices else st.text("ab,= -", max_size=5))
    if draw(st.booleans()):
        return [f"{option}={draw(words)}"]
    return [option, *draw(st.lists(words, max_size=3))]


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(options() | st.lists(st.text(max_size=6), max_size=1).filter(lambda w: w not in (["-h"], ["--help"])), max_size=8))
def test_no_command_line_raises_anything_but_a_config_error(groups):
    words = [w for group in groups for w in group]
    try:
        parsed = parse_args(words)
        assert RunConfig.from_dict(json.loads(json.dumps(parsed.run.to_dict()))) == parsed.run
        check_to_train(parsed, 4)
    except ConfigError as error:
        problems = error.problems
    else:
        problems = ["none"]
    assert problems
    assert all(isinstance(p, str) and p for p in problems)


@pytest.mark.parametrize(
    ("flags", "granularity"),
    [
        ("", None),
        ("--checkpoint-activations --deepspeed-activation-checkpointing", "full"),
        ("--recompute-activations", "selective"),
        ("--recompute-activations --recompute-granularity full", "full"),
    ],
)
def test_recomputation_flags_mean_what_they_mean_upstream(flags, granularity):
    assert parse_args(flags.split()).run.training.recompute == granularity
