"""--load and --save are checked before torch is imported, and the check leaves nothing behind."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from megatron_moe.checkpoint import files
from megatron_moe.checkpoint.compare import architecture_differences
from megatron_moe.checkpoint.files import Manifest, write_manifest
from megatron_moe.checkpoint.preflight import checkpoint_problems
from megatron_moe.config.flags import ConfigError
from megatron_moe.config.output import CheckpointConfig
from megatron_moe.config.run import RunConfig
from megatron_moe.config.training import OptimizerConfig

ARCHITECTURE = RunConfig().architecture(vocab_size=1000)
SETTINGS = RunConfig().to_dict()


def add_checkpoint(directory, iteration, settings=None, **changes):
    path = directory / f"iter_{iteration:07d}"
    path.mkdir(parents=True)
    write_manifest(path, Manifest(iteration, 1, {}, {}, {"architecture": ARCHITECTURE | changes, "config": settings or SETTINGS}))
    return path


def problems(**flags):
    config = CheckpointConfig(**{name: str(v) if isinstance(v, Path) else v for name, v in flags.items()})
    return checkpoint_problems(RunConfig(checkpoint=config), ARCHITECTURE)


def test_nothing_to_check_is_no_problem(tmp_path):
    assert problems() == []
    assert problems(save=tmp_path / "new", load=tmp_path / "new") == []
    assert not (tmp_path / "new").exists()


def test_load_without_a_checkpoint_is_a_problem_unless_it_is_the_save_directory(tmp_path):
    (only,) = problems(load=tmp_path)
    assert only.startswith(f"--load {tmp_path}: there is no checkpoint in it")
    (only,) = problems(load=tmp_path / "typo", save=tmp_path)
    assert only == f"--load {tmp_path}/typo: there is no such directory; only the directory of --save may be new"
    assert problems(load=f"{tmp_path}/./", save=tmp_path) == []


def test_exit_on_missing_checkpoint_refuses_an_empty_directory_also_when_it_is_that_of_save(tmp_path):
    (only,) = problems(load=tmp_path, save=tmp_path, exit_on_missing_checkpoint=True)
    assert only == f"--load {tmp_path}: there is no checkpoint in it, and --exit-on-missing-checkpoint wants one"
    add_checkpoint(tmp_path, 10)
    assert problems(load=tmp_path, save=tmp_path, exit_on_missing_checkpoint=True) == []
    with pytest.raises(ConfigError, match="--exit-on-missing-checkpoint needs --load DIR"):
        problems(save=tmp_path, exit_on_missing_checkpoint=True)


def test_load_of_one_iteration_directory_or_of_the_best_is_a_load_of_that_iteration(tmp_path):
    one = add_checkpoint(tmp_path, 100)
    add_checkpoint(tmp_path, 200)
    files.write_best(tmp_path, files.Best(100, 2.5))
    for load in (one, tmp_path / "best"):
        assert problems(load=load) == problems(load=load, ckpt_step=100) == []
        (only,) = problems(load=load, ckpt_step=200)
        assert "is the checkpoint of iteration 100, not of 200" in only
        (only,) = problems(load=load, save=tmp_path)
        assert "this run does not go on from the newest (200)" in only
    (only,) = problems(load=tmp_path / "iter_0000300")
    assert only == f"--load {tmp_path / 'iter_0000300'}: {tmp_path} has iterations 100, 200"
    (tmp_path / "elsewhere").mkdir()
    (only,) = problems(load=tmp_path / "elsewhere" / "best")
    assert "there is no such directory" in only


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"iteration": "a", "lm_loss": 1.0}', '{"iteration": 1, "lm_loss": NaN}'])
def test_note_of_the_best_that_cannot_be_understood_is_a_problem_where_it_is_needed(tmp_path, text):
    add_checkpoint(tmp_path, 100)
    (tmp_path / files.BEST).write_text(text)
    (only,) = problems(load=tmp_path / "best")
    assert f"{tmp_path / files.BEST} cannot be understood; name a checkpoint yourself" in only
    assert problems(load=tmp_path, save=tmp_path) == []
    (only,) = problems(load=tmp_path, save=tmp_path, save_best=True)
    assert only.startswith("--save-best: ") and "delete the file" in only


def test_same_architecture_is_no_problem(tmp_path):
    add_checkpoint(tmp_path, 10)
    assert problems(load=tmp_path) == problems(load=tmp_path, ckpt_step=10) == []


def test_another_architecture_names_the_fields(tmp_path):
    add_checkpoint(tmp_path, 10, hidden_size=512, experts_per_layer=[4, 8])
    (only,) = problems(load=tmp_path)
    lines = only.splitlines()
    assert lines[0] == f"--load {tmp_path}: iter_0000010 is of another architecture"
    assert [line.split() for line in lines[1:3]] == [["flag", "checkpoint", "now"], ["--hidden-size", "512", "768"]]
    assert lines[3].split()[:3] == ["--num-experts", "4", "8"]


def test_another_dtype_or_optimizer_names_what_differs(tmp_path):
    then = SETTINGS | {
        "training": SETTINGS["training"] | {"params_dtype": "float64"},
        "optimizer": SETTINGS["optimizer"] | {"optimizer": "sgd"},
    }
    add_checkpoint(tmp_path, 10, then)
    (only,) = problems(load=tmp_path)
    head, *table = only.splitlines()
    assert head.startswith(f"--load {tmp_path}: iter_0000010 was saved with other settings; give them again")
    rows = [["--params-dtype", "float64", "float32"], ["--optimizer", "sgd", "adam"]]
    assert [line.split() for line in table] == [["flag", "checkpoint", "now"], *rows]
    for flags in ({"finetune": True}, {"no_load_optim": True}):
        (only,) = problems(load=tmp_path, **flags)
        assert "--params-dtype" in only and "--optimizer" not in only


def test_tracker_without_any_checkpoint_is_a_problem_and_not_a_fresh_start(tmp_path):
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    (only,) = problems(load=tmp_path, save=tmp_path)
    assert "latest_checkpointed_iteration.txt says '100', but there is no checkpoint" in only


def test_the_step_that_was_asked_for_is_the_one_compared(tmp_path):
    add_checkpoint(tmp_path, 10, hidden_size=512)
    add_checkpoint(tmp_path, 20)
    assert problems(load=tmp_path) == []
    assert "iter_0000010 is of another architecture" in problems(load=tmp_path, ckpt_step=10)[0]


def test_absent_step_lists_those_that_exist(tmp_path):
    add_checkpoint(tmp_path, 10)
    add_checkpoint(tmp_path, 20)
    assert problems(load=tmp_path, ckpt_step=15) == [f"--ckpt-step 15: {tmp_path} has iterations 10, 20"]
    assert problems(load=tmp_path / "new", save=tmp_path / "new", ckpt_step=15) == [f"--ckpt-step 15: {tmp_path}/new has no checkpoint"]


def test_only_unreadable_checkpoints_are_a_problem_even_in_the_save_directory(tmp_path):
    (add_checkpoint(tmp_path, 10) / "manifest.json").write_text("{")
    (only,) = problems(load=tmp_path, save=tmp_path)
    assert "no checkpoint can be read: iter_0000010/manifest.json: cut off or damaged" in only


def test_save_that_cannot_be_created_or_written_is_a_problem(tmp_path):
    (tmp_path / "file").write_text("")
    (only,) = problems(save=tmp_path / "file" / "run")
    assert only == f"--save {tmp_path}/file/run: cannot write there (Not a directory); choose another directory"
    assert problems(save="/proc/no/run")[0].startswith("--save /proc/no/run: cannot write there")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_save_without_permission_is_a_problem(tmp_path):
    tmp_path.chmod(0o500)
    assert "Permission denied" in problems(save=tmp_path)[0]


def test_all_ranks_may_try_out_save_at_once(tmp_path):
    """When each made the directory and removed it, one could remove it under the hands of another."""
    with ThreadPoolExecutor(8) as ranks:
        answers = ranks.map(lambda _: problems(save=tmp_path / "a" / "b"), range(400))
        assert [answer for answer in answers if answer] == []


def test_trying_out_save_leaves_nothing_behind(tmp_path):
    assert problems(save=tmp_path / "a" / "b" / "c") == []
    assert os.listdir(tmp_path) == []
    assert problems(save=tmp_path) == []
    assert tmp_path.exists()


def test_all_problems_are_reported_together(tmp_path):
    (tmp_path / "file").write_text("")
    assert len(problems(load=tmp_path / "typo", save=tmp_path / "file")) == 2


def test_equal_architectures_after_json_are_equal():
    assert architecture_differences({"a": [1, 2]}, {"a": (1, 2)}) == []
    assert architecture_differences({}, {}) == []


def test_fields_of_one_side_only_and_long_tables():
    table = architecture_differences({"old_field": 1}, {"new_field": True})
    assert [line.split() for line in table[1:]] == [["--new-field", "-", "True"], ["--old-field", "1", "-"]]
    assert architecture_differences({}, {f"f{i}": i for i in range(13)})[-1] == "... and 3 more"


def test_preflight_does_not_import_torch():
    code = "import sys, megatron_moe.checkpoint.preflight; sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0


@pytest.mark.parametrize(("flags", "optimizer_has_state", "is_problem"), [
    ({}, True, True),
    ({"no_load_optim": True}, True, False),
    ({"finetune": True}, True, False),
    ({}, False, False),
])  # fmt: skip
def test_weights_without_optimizer_state_are_not_taken_for_a_whole_checkpoint(tmp_path, flags, optimizer_has_state, is_problem):
    path = tmp_path / "iter_0000010"
    path.mkdir()
    tensors = {"model.w": {"shape": [2], "dtype": "float32"}}
    write_manifest(path, Manifest(10, 1, tensors, {}, {"architecture": ARCHITECTURE}))
    optimizer = OptimizerConfig() if optimizer_has_state else OptimizerConfig(optimizer="sgd", sgd_momentum=0.0)
    run = RunConfig(checkpoint=CheckpointConfig(load=str(tmp_path), **flags), optimizer=optimizer)
    found = checkpoint_problems(run, ARCHITECTURE)
    assert bool(found) == is_problem
    if is_problem:
        assert "add --no-load-optim to go on from its iteration" in found[0]
        assert "or --finetune to start at iteration 0" in found[0]
    tensors["optimizer.step.w"] = {"shape": [], "dtype": "float32"}
    write_manifest(path, Manifest(10, 1, tensors, {}, {"architecture": ARCHITECTURE}))
    assert checkpoint_problems(run, ARCHITECTURE) == []


def test_a_folder_of_safetensors_is_recognised(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    (only,) = problems(load=tmp_path)
    assert "--load-hf" in only and "tools/convert_checkpoint.py makes a run directory of it" in only
