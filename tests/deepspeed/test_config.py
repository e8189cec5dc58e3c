"""A DeepSpeed JSON for the engine: read strictly; what is not acted on is named; numbers that do not multiply are refused."""

import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_moe.config.deepspeed_json import KEYS
from megatron_moe.config.flags import ConfigError
from megatron_moe.deepspeed.config import TABLE, batch_sizes, read_config

SIZES = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2}


@pytest.fixture
def heard():
    """Warnings of the package, whether or not an entry point in this process has set its logger up."""
    records, handler, logger = [], logging.Handler(logging.WARNING), logging.getLogger("megatron_moe")
    handler.emit = lambda record: records.append(record.getMessage())
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


def problems_of(content, ranks=2) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_config(content if isinstance(content, str) else SIZES | content, ranks)
    return caught.value.problems


# ---------------------------------------------------------------- batch numbers


@pytest.mark.parametrize(
    ("train", "micro", "steps", "ranks", "sizes"),
    [
        (16, 2, 4, 2, (16, 2, 4)),
        (16, 2, None, 4, (16, 2, 2)),
        (16, None, 2, 4, (16, 2, 2)),
        (None, 2, 3, 4, (24, 2, 3)),
        (16, None, None, 4, (16, 4, 1)),
        (None, 2, None, 4, (8, 2, 1)),
    ],
)
def test_two_of_three_batch_numbers_give_the_third(train, micro, steps, ranks, sizes):
    assert batch_sizes(train, micro, steps, ranks) == sizes


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9))
def test_any_two_agree_with_all_three(micro, steps, ranks):
    whole = (micro * steps * ranks, micro, steps)
    assert batch_sizes(*whole, ranks) == batch_sizes(whole[0], micro, None, ranks) == batch_sizes(whole[0], None, steps, ranks)
    assert batch_sizes(None, micro, steps, ranks) == whole


@pytest.mark.parametrize(
    ("train", "micro", "steps", "says"),
    [
        (16, 2, 3, r"train_batch_size \(16\) must be train_micro_batch_size_per_gpu \(2\) x gradient_accumulation_steps \(3\) x data-parallel "
                   r"ranks \(4\), which is 24"),
        (15, 2, None, "which is 8"),
        (3, None, None, "which is 0"),
        (None, None, 2, "neither train_batch_size nor train_micro_batch_size_per_gpu"),
    ],
)  # fmt: skip
def test_batch_numbers_that_do_not_multiply(train, micro, steps, says):
    with pytest.raises(ValueError, match=says):
        batch_sizes(train, micro, steps, 4)


# ---------------------------------------------------------------- keys


def test_an_empty_config_but_for_the_batch_is_deepspeeds_defaults():
    c = read_config(SIZES, 2)
    assert (c.train_batch_size, c.micro_batch_size, c.accumulation) == (8, 2, 2)
    assert (c.zero_stage, c.half, c.loss_scale, c.clip_grad, c.is_offloaded) == (0, None, None, 1.0, False)
    assert (c.optimizer, c.scheduler, c.moe, c.steps_per_print) == ({}, {}, {}, None)
    assert not c.curriculum.curriculum_learning


def test_the_sections_of_the_tutorials():
    c = read_config(SIZES | {
        "optimizer": {"type": "Adam", "params": {"lr": 0.001, "betas": [0.8, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}},
        "gradient_clipping": 1.0, "prescale_gradients": False, "bf16": {"enabled": False},
        "fp16": {"enabled": True, "fp16_master_weights_and_grads": False, "loss_scale": 0, "loss_scale_window": 500, "hysteresis": 2,
                 "min_loss_scale": 1, "initial_scale_power": 15},
        "wall_clock_breakdown": False,
        "zero_optimization": {"stage": 2, "allgather_partitions": True, "reduce_scatter": True, "allgather_bucket_size": 50000000,
                              "reduce_bucket_size": "5e8", "overlap_comm": True, "contiguous_gradients": True, "cpu_offload": True},
    }, 2)  # fmt: skip
    assert c.optimizer == {
        "optimizer_type": "Adam",
        "lr": 0.001,
        "adam_beta1": 0.8,
        "adam_beta2": 0.999,
        "adam_eps": 1e-8,
        "weight_decay": 3e-7,
    }
    assert c.scheduler == {"scheduler_type": "WarmupLR", "warmup_min_lr": 0.0, "warmup_max_lr": 0.001, "warmup_num_steps": 1000}
    assert (c.half, c.loss_scale.initial_loss_scale, c.loss_scale.loss_scale_window, c.zero_stage) == ("float16", 2.0**15, 500, 2)
    assert c.is_offloaded and not c.is_stored_in_half


def test_every_key_of_pretraining_is_known_to_the_engine():
    own = [k for k in KEYS if k.partition(".")[0] not in ("optimizer", "scheduler", "csv_monitor", "tensorboard")]
    assert set(own) <= set(TABLE.keys)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"zero_optimisation": {"stage": 1}}, "there is no key zero_optimisation; did you mean zero_optimization?"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage must be at most 3, not 4"),
        ({"zero_optimization": {"stage": -1}}, "zero_optimization.stage must be at least 0, not -1"),
        ({"zero_optimization": {"stage": "two"}}, "zero_optimization.stage wants a whole number, not 'two'"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, "offload to NVMe is not built yet; use cpu"),
        ({"optimizer": {"type": "AdanW"}}, "optimizer.type must be one of Adam, AdamW, SGD, not 'AdanW' (did you mean 'AdamW'?)"),
        ({"optimizer": {"type": "Adam", "params": {"learning_rate": 1}}}, "there is no key optimizer.params.learning_rate"),
        ({"optimizer": {"type": "Adam", "params": {"betas": 0.9}}}, "optimizer.params.betas wants two numbers"),
        ({"optimizer": {"type": "Adam", "params": {"momentum": 0.9}}}, "optimizer.params.momentum is SGD's, and the type is Adam"),
        ({"optimizer": {"type": "SGD", "params": {"betas": [0.9, 0.9]}}}, "optimizer.params.betas is Adam's, and the type is SGD"),
        ({"optimizer": {"params": {"lr": 0.1}}}, "the optimizer section has parameters (lr) and no type"),
        ({"optimizer": {"type": "Adam", "params": {"bias_correction": False}}}, "Adam without bias correction is not built yet"),
        (
            {"scheduler": {"type": "WarmupLR", "params": {"total_num_steps": 5}}},
            "scheduler.params.total_num_steps is no parameter of WarmupLR",
        ),
        ({"scheduler": {"type": "WarmupDecayLR"}}, "scheduler.params.total_num_steps is missing: WarmupDecayLR needs it"),
        ({"scheduler": {"type": "Cosine"}}, "scheduler.type must be one of"),
        ({"scheduler": {"params": {"warmup_num_steps": 5}}}, "the scheduler section has parameters (warmup_num_steps) and no type"),
        ({"fp16": {"enabled": True}, "bf16": {"enabled": True}}, "fp16.enabled and bf16.enabled are both true"),
        ({"fp16": {"fp16_master_weights_and_grads": True}}, "and fp16.enabled is not"),
        (
            {"fp16": {"enabled": True, "fp16_master_weights_and_grads": True}, "optimizer": {"type": "SGD"}},
            "needs an optimizer section of type AdamW",
        ),
        (
            {"fp16": {"enabled": True, "initial_scale_power": 0, "min_loss_scale": 4}},
            "fp16.initial_scale_power (1) must not be below fp16.min_loss_scale (4)",
        ),
        ({"gradient_clipping": -1}, "gradient_clipping must be at least 0, not -1"),
        (
            {"curriculum_learning": {"enabled": True, "curriculum_type": "voc"}},
            "a curriculum of anything but the length (seqlen) is not built yet",
        ),
        ({"curriculum_learning": {"enabled": True, "min_difficulty": 8}}, "curriculum_learning.schedule_config.total_curriculum_step"),
        ({"moe": {"num_expert": 8}}, "there is no key moe.num_expert; did you mean moe.num_experts?"),
        ({"train_batch_size": 0}, "train_batch_size must be at least 1, not 0"),
        ({"wandb": {"enabled": True}}, "Weights & Biases is not built yet"),
    ],
)
def test_a_wrong_key_or_value_is_an_error_that_names_it(content, says):
    assert any(says in problem for problem in problems_of(content)), problems_of(content)


def test_all_problems_are_said_at_once():
    found = problems_of({"zero_optimization": {"stage": 9, "stge": 1}, "fp16": {"enabled": 1}})
    assert len(found) == 3


def test_keys_that_are_not_acted_on_are_named_in_one_warning(heard):
    read_config(SIZES | {"wall_clock_breakdown": True, "zero_optimization": {"overlap_comm": True}, "moe": {"moe_loss_coeff": 0.01},
                             "gradient_clipping": 1.0}, 2)  # fmt: skip
    assert heard == ["the DeepSpeed config: not acted on here: wall_clock_breakdown, zero_optimization.overlap_comm, moe.moe_loss_coeff"]


def test_a_file_with_comments_and_trailing_commas_is_read_with_one_warning(tmp_path, heard):
    path = tmp_path / "ds.json"
    path.write_text(
        '{\n  "train_batch_size": 8, // two ranks\n  "train_micro_batch_size_per_gpu": 2,\n  "zero_optimization": {"reduce_bucket_size": 5e8,},\n}'
    )
    assert read_config(str(path), 2).accumulation == 2
    assert sum("comments or trailing commas" in n for n in heard) == 1 and len(heard) == 2


def test_auto_is_left_to_the_other_numbers():
    assert (
        read_config({"train_batch_size": 8, "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": "auto"}, 2).accumulation
        == 2
    )


def test_a_config_is_not_changed_by_reading_it():
    content = SIZES | {"moe": {"num_experts": 8}, "optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.99]}}}
    before = json.dumps(content)
    read_config(content, 2)
    assert json.dumps(content) == before


def test_the_moe_section_of_the_tutorials():
    c = read_config(SIZES | {"moe": {
        "enabled": True, "num_experts": 8, "expert_parallel_size": 2, "moe_loss_coeff": 0.01, "train_capacity_factor": 1.25,
        "eval_capacity_factor": 2.0, "min_capacity": 4, "drop_tokens": True, "use_residual": False, "use_tutel": False,
    }}, 2)  # fmt: skip
    assert c.moe == {
        "num_experts": (8,), "moe_expert_parallel_size": 2, "mlp_type": "standard", "moe_train_capacity_factor": 1.25,
        "moe_eval_capacity_factor": 2.0, "moe_min_capacity": 4, "moe_token_dropping": True,
    }  # fmt: skip


def test_a_moe_section_that_is_switched_off_says_nothing():
    assert read_config(SIZES | {"moe": {"enabled": False, "num_experts": 8}}, 2).moe == {}
