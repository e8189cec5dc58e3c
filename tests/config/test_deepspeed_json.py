"""A DeepSpeed JSON is one more source of settings: read strictly, and never at odds with the command line in silence."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from upstream_commands import ALL, ds_json

from megatron_moe.arguments import MissingFile, check_to_train, parse_args
from megatron_moe.config.deepspeed_json import KEYS, SECTIONS, WEAK_FIELDS, read_deepspeed
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.run import FIELDS

TINY = ["--preset", "tiny", "--mock-data"]


@pytest.fixture
def with_json(tmp_path):
    """Flags that name a JSON of this content."""

    def write(content: dict | str) -> list[str]:
        file = tmp_path / "ds.json"
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return ["--deepspeed_config", str(file)]

    return write


def problems_of(words: list[str], world: int | None = 1) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_to_train(parse_args(words), world)
    return caught.value.problems


def nested(key: str, value) -> dict:
    """'a.b', 1 -> {'a': {'b': 1}}"""
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


# ---------------------------------------------------------------- what the keys mean


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({"train_batch_size": 256, "train_micro_batch_size_per_gpu": "4"}, {"global_batch_size": 256, "micro_batch_size": 4}),
        ({"gradient_accumulation_steps": 8}, {"gradient_accumulation_steps": 8}),
        ({"gradient_clipping": 0.5, "steps_per_print": 10}, {"clip_grad": 0.5, "log_interval": 10}),
        ({"zero_optimization": {"stage": 2}}, {"zero_stage": 2}),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": False}}, {"fp16": True, "bf16": False}),
        ({"bfloat16": {"enabled": True}}, {"bf16": True}),
        ({"fp16": {"enabled": True, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 3, "min_loss_scale": 2, "initial_scale_power": 11}},
         {"fp16": True, "loss_scale_window": 500, "hysteresis": 3, "min_loss_scale": 2.0, "initial_loss_scale": 2048.0}),
        ({"fp16": {"enabled": True, "loss_scale": 128, "fp16_master_weights_and_grads": True}},
         {"fp16": True, "loss_scale": 128.0, "fp16_master_weights_and_grads": True}),
        ({"fp16": {"enabled": False, "loss_scale": 128}}, {"fp16": False}),
        ({"zero_optimization": {"stage": 2, "cpu_offload": True}}, {"zero_stage": 2, "cpu_optimizer": True}),
        ({"zero_optimization": {"offload_optimizer": {"device": "cpu", "pin_memory": True}}}, {"cpu_optimizer": True}),
        ({"optimizer": {"type": "Muon"}}, {"optimizer": "muon"}),
        ({"optimizer": {"type": "AdamW"}}, {"optimizer": "adam"}),
        ({"optimizer": {"type": "adam", "params": {"lr": "1e-4", "betas": [0.9, 0.95], "eps": 1e-6, "weight_decay": 0.1}}},
         {"optimizer": "adam", "lr": 1e-4, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_eps": 1e-6, "weight_decay": 0.1}),
        ({"optimizer": {"type": "SGD", "params": {"momentum": 0.5}}}, {"optimizer": "sgd", "sgd_momentum": 0.5}),
        ({"optimizer": {"params": {"lr": "auto"}}, "train_batch_size": "auto"}, {}),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 1e-3, "warmup_num_steps": 10, "warmup_type": "linear"}}},
         {"lr": 1e-3, "lr_warmup_iters": 10, "lr_decay_style": "constant"}),
        ({"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": 90, "warmup_type": "linear"}}},
         {"lr_warmup_iters": 1000, "lr_decay_style": "linear", "lr_decay_iters": 90}),
        ({"moe": {"num_experts": [4, 8], "expert_parallel_size": 2, "moe_loss_coeff": 0.01, "capacity_factor": 1.25, "k": 2,
                  "eval_capacity_factor": 2, "min_capacity": 8, "drop_tokens": False, "use_residual": True, "use_tutel": True}},
         {"num_experts": (4, 8), "moe_expert_parallel_size": 2, "moe_loss_coeff": 0.01, "moe_train_capacity_factor": 1.25, "topk": 2,
          "moe_eval_capacity_factor": 2.0, "moe_min_capacity": 8, "moe_token_dropping": False, "mlp_type": "residual"}),
        ({"moe": {"enabled": False, "num_experts": 8}}, {"num_experts": (1,)}),
        ({"moe": {"enabled": True, "num_experts": 8, "noisy_gate_policy": None}}, {"num_experts": (8,), "moe_noisy_gate_policy": "None"}),
    ],
)  # fmt: skip
def test_keys_become_settings(content, values):
    read = read_deepspeed(content)
    assert (read.values, read.problems, read.not_yet) == (values, [], [])


def test_every_key_that_sets_something_names_fields_that_exist():
    """One value of the right kind for each key: what it sets must be a field of ours."""
    samples = {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}, "optimizer.type": "Adam", "zero_optimization.stage": 1,
               "optimizer.params.betas": [0.5, 0.5], "curriculum_learning.schedule_type": "fixed_root",
               "moe.noisy_gate_policy": "Jitter"}  # fmt: skip
    for key, known in KEYS.items():
        if known.fields:
            read = next(r for v in (samples.get(key), 0.5, 1, True) if v is not None and not (r := read_deepspeed(nested(key, v))).problems)
            assert read.values or key == "moe.enabled", key
            assert read.values.keys() <= FIELDS.keys()


def test_keys_that_are_not_acted_on_are_named_in_one_warning(with_json):
    words = [*TINY, *with_json({"prescale_gradients": True, "zero_optimization": {"reduce_bucket_size": 5e8}, "fp16": {"loss_scale": 0}})]
    (warning,) = parse_args(words).warnings
    assert warning.endswith("ds.json: not acted on here: prescale_gradients, zero_optimization.reduce_bucket_size")


def test_settings_of_a_section_that_is_off_are_no_matter_for_a_warning():
    off = {"enabled": False, "schedule_type": "fixed_linear", "schedule_config": {"difficulty_step": 8}}
    assert read_deepspeed({"curriculum_learning": off}).warnings == []


@pytest.mark.parametrize(
    ("content", "feature"),
    [
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload_optimizer.device: offload to NVMe"),
        ({"data_efficiency": {"enabled": True}}, "the data efficiency library"),
        ({"compression_training": {"weight_quantization": {}}}, "compression"),
        ({"optimizer": {"params": {"adam_w_mode": False}}}, "adam_w_mode: Adam with L2"),
        ({"scheduler": {"type": "WarmupLR"}}, "logarithmic warm-up"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_min_lr": 1e-6}}}, "another rate than 0"),
        ({"scheduler": {"type": "OneCycle", "params": {"cycle_min_lr": 1}}}, "the schedule OneCycle"),
    ],
)
def test_features_that_are_not_built_yet_parse_and_are_refused_when_training(content, feature, with_json):
    words = [*TINY, *with_json(content)]
    assert parse_args(words).run == parse_args(TINY + (["--zero-stage", "2"] if "stage" in str(content) else [])).run
    (problem,) = problems_of(words)
    assert feature in problem and "not built yet" in problem and "ds.json: " in problem


@pytest.mark.parametrize(
    "content",
    [
        {"zero_optimization": {"cpu_offload": False, "offload_optimizer": {"device": "none"}, "offload_param": {"device": None}}},
        {"curriculum_learning": {"enabled": False}, "wandb": {}, "data_efficiency": {"seed": 1}, "amp": {"enabled": False}},
        {"optimizer": {"params": {"adam_w_mode": True, "bias_correction": True}}},
    ],
)
def test_features_that_are_switched_off_are_fine(content):
    assert (read_deepspeed(content).not_yet, read_deepspeed(content).problems) == ([], [])


CURRICULUM = {
    "enabled": True, "curriculum_type": "seqlen", "min_difficulty": 8, "max_difficulty": 64, "schedule_type": "fixed_root",
    "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 16, "root_degree": 3},
}  # fmt: skip


def test_a_curriculum_in_the_json_is_that_of_the_flags(with_json):
    flags = "--curriculum-learning --curriculum-min-difficulty 8 --curriculum-max-difficulty 64 --curriculum-schedule-type fixed_root " \
        "--curriculum-total-step 10 --curriculum-difficulty-step 16 --curriculum-root-degree 3"  # fmt: skip
    assert parse_args([*TINY, *with_json({"curriculum_learning": CURRICULUM})]).run == parse_args([*TINY, *flags.split()]).run
    table = {"difficulty": [8, 64], "max_step": [5]}
    of_json = parse_args(
        [*TINY, *with_json({"curriculum_learning": CURRICULUM | {"schedule_type": "fixed_discrete", "schedule_config": table}})]
    )
    assert (of_json.run.curriculum.curriculum_difficulty, of_json.run.curriculum.curriculum_max_step) == ((8, 64), (5,))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"curriculum_type": "vocab"},
            "curriculum_learning.curriculum_type: a curriculum of anything but the length (seqlen) is not built yet",
        ),
        ({"min_difficulty": "short"}, "curriculum_learning.min_difficulty wants a whole number, not 'short'"),
        (
            {"schedule_type": "custom"},
            "curriculum_learning.schedule_type must be one of fixed_linear, fixed_root, fixed_discrete, not 'custom'",
        ),
        ({"max_difficulty": 4096}, "a curriculum up to 4096 tokens does not fit into --seq-length (128)"),
        ({"schedule_config": {"difficulty_step": 8}}, "--curriculum-schedule-type fixed_root needs --curriculum-total-step"),
    ],
)
def test_a_curriculum_that_cannot_be_is_refused(changes, said, with_json):
    problems = problems_of([*TINY, *with_json({"curriculum_learning": CURRICULUM | changes})])
    assert any(said in p for p in problems), problems


def test_the_fp16_section_is_the_flags(with_json):
    flags = ["--fp16", "--hysteresis", "3", "--initial-loss-scale", "65536", "--loss-scale-window", "100", "--min-loss-scale", "4"]
    section = {"enabled": True, "hysteresis": 3, "initial_scale_power": 16, "loss_scale_window": 100, "min_loss_scale": 4}
    assert parse_args([*TINY, *with_json({"fp16": section})]).run == parse_args([*TINY, *flags]).run


def test_loss_scale_flags_that_disagree_with_the_json_name_both(with_json):
    (problem,) = problems_of([*TINY, "--fp16", "--hysteresis", "2", *with_json({"fp16": {"hysteresis": 4}})])
    assert "--hysteresis 2 on the command line contradicts fp16.hysteresis: 4 in " in problem


# ---------------------------------------------------------------- mistakes in the JSON


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"zero_optimisation": {"stage": 1}}, "there is no key zero_optimisation; did you mean zero_optimization?"),
        ({"zero_optimization": {"stge": 1}}, "there is no key zero_optimization.stge; did you mean zero_optimization.stage?"),
        ({"stage": 1}, "there is no key stage; did you mean zero_optimization.stage?"),
        ({"optimizer": {"lr": 1}}, "there is no key optimizer.lr; did you mean optimizer.params.lr?"),
        ({"bf16": {"qqq": 1}}, "there is no key bf16.qqq; bf16 knows check_grad_overflow, enabled, immediate_grad_update"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage wants a whole number, not 'two'"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be at most 3, not 4"),
        ({"zero_optimization": 2}, "zero_optimization wants a section {...}, not 2"),
        ({"train_batch_size": {"a": 1}}, "train_batch_size wants a whole number"),
        ({"train_batch_size": None}, "train_batch_size wants a value, not null"),
        ({"fp16": {"enabled": "true"}}, "fp16.enabled wants true or false, not 'true'"),
        ({"fp16": {"loss_scale": "big"}}, "fp16.loss_scale wants a number, not 'big'"),
        ({"fp16": {"initial_scale_power": "big"}}, "fp16.initial_scale_power wants a number from -126 to 126"),
        ({"zero_optimization": {"offload_optimizer": {"device": "tpu"}}}, "offload_optimizer.device must be cpu or none, not 'tpu'"),
        ({"log_level": 3}, "log_level wants text, not 3"),
        ({"gradient_clipping": True}, "gradient_clipping wants a number, not True"),
        ({"zero_optimization": {"overlap_comm": 1}}, "zero_optimization.overlap_comm wants true or false, not 1"),
        ({"optimizer": {"type": "Lamb"}}, "optimizer.type must be one of Adam, AdamW, FusedAdam, DeepSpeedCPUAdam, SGD, Muon, not 'Lamb'"),
        ({"optimizer": {"type": "AdanW"}}, "did you mean AdamW?"),
        ({"optimizer": {"params": {"betas": 0.9}}}, "optimizer.params.betas wants two numbers such as [0.9, 0.95], not 0.9"),
        ({"optimizer": {"params": {"betas": [0.9, 2]}}}, "optimizer.params.betas for --adam-beta2 must be at most"),
        ({"scheduler": {"type": "Warmup"}}, "scheduler wants"),
        ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 1}}}, "no key params.warmup_steps; did you mean warmup_num_steps?"),
        ({"moe": {"capacity_factor": 1, "train_capacity_factor": 2}}, "moe.capacity_factor: 1 and moe.train_capacity_factor: 2 set the same"),
        ({"moe": {"num_experts": "many"}}, "moe.num_experts wants whole numbers such as"),
        ([1], "cannot be read: wants one object {...}, not list"),
        ('{"train_batch_size": 1', "cannot be read"),
        ('{"steps_per_print": 1, "steps_per_print": 2}', "given twice in one section: steps_per_print"),
        ('{"gradient_clipping": NaN}', "gradient_clipping must be a finite number"),
    ],
)  # fmt: skip
def test_mistakes_name_the_key_and_come_beside_those_of_the_command_line(content, said, with_json):
    first, second = problems_of([*TINY, "--num-layers", "x", *with_json(content)])
    assert "--num-layers wants a whole number" in first
    assert "ds.json: " in second and said in second, second


def test_every_misspelt_key_has_a_neighbour_and_every_wrong_type_is_a_problem():
    rng = random.Random(0)
    for key in rng.sample(sorted(KEYS), 40):
        problems = read_deepspeed(nested(key[:-2] + key[-1] + "x", 1)).problems
        assert len(problems) == 1 and ("did you mean" in problems[0] or " knows " in problems[0]), problems
        if KEYS[key].kind is not None or KEYS[key].fields:
            assert len(read_deepspeed(nested(key, {"what": "ever"})).problems) == 1, key
    for section in SECTIONS:
        assert "wants a section" in read_deepspeed(nested(section, 7)).problems[0]


def test_comments_and_trailing_commas_are_passed_over_with_one_warning(with_json):
    text = """{
      // the batch, see "train_batch_size": 1
      "train_batch_size": 256, /* and
      more */ "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.95,],},},
      "communication_data_type": "fp32 // , }",
      "zero_optimization": {"stage": 2, "reduce_bucket_size": 5e8,},
    }"""
    words = with_json(text)
    read = read_deepspeed(words[1])
    assert read.problems == []
    assert (read.values["global_batch_size"], read.values["adam_beta2"], read.values["zero_stage"]) == (256, 0.95, 2)
    assert next(e.value for e in read.entries if e.key == "communication_data_type") == "fp32 // , }"
    assert [("comments or trailing commas" in w) for w in read.warnings] == [True, False]


def test_a_file_that_is_no_text_or_a_folder_is_a_problem(tmp_path):
    (tmp_path / "bad.json").write_bytes(b"\xff\xfe{")
    for path in (tmp_path / "bad.json", tmp_path):
        assert any("cannot be read" in p for p in problems_of([*TINY, "--deepspeed-config", str(path)]))
    assert problems_of([*TINY, "--deepspeed-config"]) == ["--deepspeed-config wants a value"]


def test_files_of_settings_that_are_not_here_are_listed_and_refused_when_training(tmp_path):
    parsed = parse_args([*TINY, "--deepspeed_config", "none.json", "--config", "none.yaml"])
    assert parsed.missing == [MissingFile("--config", "none.yaml"), MissingFile("--deepspeed-config", "none.json")]
    with pytest.raises(ConfigError) as refused:
        check_to_train(parsed, 1)
    assert [str(m) for m in parsed.missing] == refused.value.problems
    assert "--deepspeed-config none.json: cannot be read: there is no such file" in refused.value.problems


# ---------------------------------------------------------------- beside the other sources


def test_the_json_overrides_defaults_and_presets(with_json):
    parsed = parse_args([*TINY, *with_json({"train_batch_size": 16, "gradient_clipping": 0.25, "zero_optimization": {"stage": 3}})])
    run = parsed.run
    assert (run.training.global_batch_size, run.optimizer.clip_grad, run.parallel.zero_stage) == (16, 0.25, 3)


def test_the_json_is_read_without_the_deepspeed_switch_and_from_yaml(with_json, tmp_path):
    _, path = with_json({"gradient_clipping": 0.25})
    (tmp_path / "run.yaml").write_text(f"deepspeed_config: {path}\n")
    assert parse_args(["--deepscale_config", path]).run.optimizer.clip_grad == 0.25
    assert parse_args(["--config", str(tmp_path / "run.yaml")]).run.optimizer.clip_grad == 0.25


@pytest.mark.parametrize(
    ("words", "content", "both"),
    [
        ("--clip-grad 1.0", {"gradient_clipping": 0.5}, ["--clip-grad 1.0 on the command line", "gradient_clipping: 0.5 in "]),
        ("--fp16", {"fp16": {"enabled": False}}, ["--fp16 on", "fp16.enabled: false in "]),
        ("--model-parallel-size 1 --zero-stage 1", {"zero_optimization": {"stage": 2}}, ["--zero-stage 1 ", "zero_optimization.stage: 2"]),
        ("--micro-batch-size 4", {"train_micro_batch_size_per_gpu": 2}, ["--micro-batch-size 4 ", "train_micro_batch_size_per_gpu: 2"]),
        ("--num-experts 4 8", {"moe": {"num_experts": 8}}, ["--num-experts 4 8 ", "moe.num_experts: 8"]),
        ("--num-experts 8", {"moe": {"enabled": False}}, ["--num-experts 8 ", "moe.enabled: false"]),
        ("--disable-moe-token-dropping", {"moe": {"drop_tokens": True}}, ["--disable-moe-token-dropping ", "moe.drop_tokens: true"]),
        ("--adam-beta2 0.999", {"optimizer": {"params": {"betas": [0.9, 0.95]}}}, ["--adam-beta2 0.999 ", "betas: [0.9, 0.95]"]),
        ("--lr-warmup-tokens 5", {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear"}}}, ["--lr-warmup-tokens 5", "scheduler"]),
    ],
)  # fmt: skip
def test_a_flag_that_contradicts_the_json_is_a_problem_naming_both(words, content, both, with_json):
    (problem,) = problems_of([*words.split(), "--mock-data", "--train-iters", "9", *with_json(content)], world=None)
    assert all(part in problem for part in [*both, "contradicts", "make them equal or drop one"]), problem


def test_yaml_is_an_explicit_source_too_unless_the_command_line_overrides_it(with_json, tmp_path):
    (tmp_path / "run.yaml").write_text("clip_grad: 1.0\n")
    words = ["--config", str(tmp_path / "run.yaml"), *with_json({"gradient_clipping": 0.5})]
    (problem,) = problems_of([*words, "--mock-data", "--train-iters", "1"])
    assert "--clip-grad 1.0 in " in problem and "run.yaml contradicts gradient_clipping: 0.5" in problem
    assert parse_args([*words, "--clip-grad", "0.5"]).run.optimizer.clip_grad == 0.5


def test_equal_values_in_other_spellings_do_not_contradict(with_json):
    words = ["--lr", "1e-4", "--clip-grad", "1", "--num-experts", "[8]", "--zero-stage", "1.0", "--bf16"]
    content = {"optimizer": {"params": {"lr": "0.0001"}}, "gradient_clipping": 1.0, "moe": {"num_experts": 8},
               "zero_optimization": {"stage": 1}, "bf16": {"enabled": True}}  # fmt: skip
    assert parse_args([*words, *with_json(content)]).run == parse_args(words).run


def test_lines_of_deepspeed_and_of_megatron_may_come_at_different_steps(with_json):
    assert WEAK_FIELDS == ("log_interval",)
    parsed = parse_args(["--log-interval", "100", *with_json({"steps_per_print": 10})])
    assert parsed.run.logging.log_interval == 100
    assert any("steps_per_print: 10 in " in w and w.endswith("gives way to --log-interval 100") for w in parsed.warnings)


def test_two_precisions_name_where_each_comes_from(with_json):
    (problem,) = problems_of([*TINY, "--bf16", *with_json({"fp16": {"enabled": True}})])
    assert problem.startswith("--bf16 and --fp16 exclude each other") and "--fp16 is fp16.enabled: true in " in problem


# ---------------------------------------------------------------- the three sizes of a batch


def test_batch_sizes_agree_with_the_number_of_ranks_or_are_named_all_three(with_json):
    content = {"train_batch_size": 32, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 4}
    words = [*TINY, *with_json(content)]
    check_to_train(parse_args(words), 4)
    (problem,) = problems_of(words, world=2)
    for part in ("--global-batch-size (32)", "--micro-batch-size (2)", "--gradient-accumulation-steps (4)", "data-parallel size (2) = 16",
                 "use --global-batch-size 16 or --gradient-accumulation-steps 8 or --micro-batch-size 4",
                 "--global-batch-size is train_batch_size: 32 in ", "--micro-batch-size is train_micro_batch_size_per_gpu: 2 in ",
                 "--gradient-accumulation-steps is gradient_accumulation_steps: 4 in "):  # fmt: skip
        assert part in problem, problem


def test_accumulation_steps_give_the_global_batch(with_json):
    run = parse_args(with_json({"train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": 3})).run
    assert (run.global_batch_size(4), run.num_microbatches(4)) == (24, 3)
    assert list(run.world_problems(4)) == []


def test_a_batch_without_its_microbatch_says_what_is_taken(with_json):
    (warning,) = parse_args(with_json({"train_batch_size": 8})).warnings
    assert "train_batch_size without train_micro_batch_size_per_gpu" in warning and "--micro-batch-size is 1" in warning


# ---------------------------------------------------------------- any JSON at all

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["auto", "5e8", "Adam", "WarmupLR", "cpu", ""])
NAMES = st.sampled_from(sorted({name for key in KEYS for name in key.split(".")})) | st.text(max_size=3)


@settings(max_examples=200, deadline=None)
@given(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(NAMES, inner, max_size=4), max_leaves=12)
       | st.dictionaries(st.sampled_from(sorted(KEYS)), SCALARS, max_size=4))  # fmt: skip
def test_no_json_raises_and_what_is_read_are_values_of_fields(content):
    if isinstance(content, dict):
        content = (
            {k: v for key, v in content.items() for k, v in nested(key, v).items()} if any("." in str(k) for k in content) else content
        )
    read = read_deepspeed(content if isinstance(content, dict) else {"optimizer": content})
    assert read.values.keys() <= FIELDS.keys()
    assert all(isinstance(text, str) and text for text in [*read.problems, *read.not_yet, *read.warnings])
    assert all(read.origin(name).fields for name in read.values)


# ---------------------------------------------------------------- whole files


@pytest.mark.parametrize("name", [n for n, launch in ALL.items() if launch.json])
def test_the_jsons_that_people_have_agree_with_their_commands(name, with_json):
    launch = ALL[name]
    words = [w for w in launch.flags if not w.startswith(("ds_config", "--deepspeed_config"))]
    parsed = parse_args([*words, *with_json(launch.json)])
    assert parsed.run.training.fp16
    assert list(parsed.run.world_problems(launch.ranks)) == []
    assert len([w for w in parsed.warnings if "ds.json" in w and "not acted on" in w]) == 1


def test_a_dict_is_read_as_a_file_is(with_json):
    content = ds_json(256, 4, 1)
    from_file, from_dict = read_deepspeed(with_json(content)[1]), read_deepspeed(content)
    assert (from_file.values, from_file.entries) == (from_dict.values, from_dict.entries)
    assert from_dict.warnings[0].startswith("the DeepSpeed config: not acted on")


def test_reading_a_json_does_not_load_torch(with_json):
    code = f"import sys\nfrom megatron_moe.arguments import parse_args\nparse_args({with_json(ds_json(8, 1, 1))!r})\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).resolve().parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_page_for_newcomers_names_every_key_that_is_acted_on():
    page = (Path(__file__).resolve().parents[2] / "docs" / "from_megatron_deepspeed.md").read_text()
    table = page.partition("## The JSON")[2].partition("## What is")[0]
    words = set(re.findall(r"[\w.]+", table))
    acted_on = [key for key, known in KEYS.items() if known.fields and not key.startswith("bfloat16.")]
    assert [key for key in acted_on if not {key, key.rpartition(".")[2]} & words] == []
