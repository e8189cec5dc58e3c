"""tools/translate_launch.py: the command that it prints is the run that the line meant, or it says what stands in the way."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from upstream_commands import ALL, ds_json

from megatron_moe.arguments import parse_args
from tools import translate_launch

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 --num-experts 4 --mock-data "
    "--train-iters 2 --log-interval 1 --eval-iters 0 --num-workers 0"
)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def translated(capsys):
    """(exit code, table, words of the command, messages) of a line given behind `--`."""

    def run(line: str, *flags: str):
        code = translate_launch.main([*flags, "--", *shlex.split(line)])
        return (code, *taken_apart(*capsys.readouterr()))

    return run


def taken_apart(out: str, err: str) -> tuple[str, list[str], str]:
    table = "\n".join(line for line in out.splitlines() if line.startswith("#"))
    return table, shlex.split(out.replace("\\\n", ""), comments=True), err


def row_of(table: str, given: str) -> list[str]:
    """The cells behind `given`."""
    (row,) = [line for line in table.splitlines() if line.removeprefix("# ").split(" | ")[0].strip() == given]
    return [cell.strip() for cell in row.split("|")[1:]]


def flags_of(words: list[str]) -> list[str]:
    return words[words.index("pretrain_gpt_moe.py") + 1 :]


def write_json(launch, name="ds_config.json") -> None:
    Path(name).write_text(json.dumps(launch.json))


# ---------------------------------------------------------------- the same run


@pytest.mark.parametrize("name", ALL)
def test_a_translated_command_is_the_same_run_and_needs_no_json(name, translated):
    launch = ALL[name]
    for file in ("ds_config.json", "ds_config_moe.json"):
        write_json(launch, file)
    code, table, words, err = translated(launch.line)
    assert (code, err) == (0, "")
    original = parse_args(launch.flags)
    for file in Path().glob("*.json"):
        file.unlink()
    again = parse_args(flags_of(words))
    assert again.run == original.run
    assert again.not_yet == original.not_yet
    assert again.warnings == list(again.run.warnings())  # nothing without effect is left
    assert all(row_of(table, spelled) for spelled in ("deepspeed", "--fp16"))


def test_the_table_says_what_became_of_each_flag_and_each_key(translated):
    launch = ALL["gpt-1.3b-pr-moe-64-128"]
    write_json(launch)
    _, table, words, _ = translated(launch.line)
    rows = [line.removeprefix("# ").split(" | ")[0].split() for line in table.splitlines() if " | " in line]
    shown = {row[0] for row in rows}
    assert {w for w in launch.flags if w.startswith("--")} <= shown
    assert {f"{k}:" for k in ("train_batch_size", "zero_optimization.stage", "fp16.loss_scale_window", "wall_clock_breakdown")} <= shown
    assert row_of(table, "--override-opt_param-scheduler") == ["", "the schedule always follows the command line"]
    assert row_of(table, "zero_optimization.stage: 2") == ["--zero-stage 2"]
    assert row_of(table, "gradient_clipping: 1.0") == ["", "--clip-grad is on the command line"]
    assert row_of(table, "fp16.loss_scale_window: 500") == ["--loss-scale-window 500"]
    assert row_of(table, "fp16.initial_scale_power: 11") == ["--initial-loss-scale 2048.0"]
    assert "disagree: nowhere" in table
    assert words[:3] == ["torchrun", "--nproc-per-node", "auto"]


def test_aliases_become_the_main_spelling_and_an_earlier_value_gives_way(translated):
    _, table, words, _ = translated("deepspeed pretrain_gpt.py --model-parallel-size 1 --lr 1e-3 --lr 2e-3 --disable-moe-token-dropping")
    assert flags_of(words) == ["--tensor-model-parallel-size", "1", "--lr", "2e-3", "--disable-moe-token-dropping"]
    assert row_of(table, "--lr 1e-3") == ["", "said again by --lr"]


def test_settings_that_a_preset_would_change_are_all_written_out(translated):
    """2 is a default that --preset tiny overrides: leaving it out would be another run."""
    Path("ds.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0}))
    _, table, words, _ = translated("deepspeed pretrain_gpt.py --preset tiny --deepspeed_config ds.json")
    assert flags_of(words) == ["--preset", "tiny", "--micro-batch-size", "1"]
    assert row_of(table, "gradient_clipping: 1.0") == ["", "--clip-grad 1.0 is the default"]


def test_values_survive_the_shell(capsys):
    values = ["a b", "it's", "$HOME `id`", '"', "a\nexit 1", "*", "~", "back\\slash"]
    for value in values:
        assert translate_launch.main(["--", "deepspeed", "pretrain_gpt.py", "--save", value, "--mock-data"]) == 0
        out = capsys.readouterr().out
        script = out.replace("torchrun", "printf '%s\\0'")
        words = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True, timeout=20).stdout.split("\0")
        assert words[words.index("--save") + 1] == value


# ---------------------------------------------------------------- launchers


@pytest.mark.parametrize(
    ("line", "command"),
    [
        ("deepspeed --num_gpus 8 pretrain_moe.py --lr 1", "torchrun --nproc-per-node 8 pretrain_gpt_moe.py --lr 1"),
        ("deepspeed --num_gpus=8 --master_port=29501 --no_local_rank --module megatron.pretrain_gpt --lr 1",
         "torchrun --nproc-per-node 8 --master-port 29501 pretrain_gpt_moe.py --lr 1"),
        ("deepspeed --include localhost:1,3 examples/pretrain_gpt.py --lr 1",
         "CUDA_VISIBLE_DEVICES=1,3 torchrun --nproc-per-node 2 pretrain_gpt_moe.py --lr 1"),
        ("NCCL_DEBUG=INFO A='b c' deepspeed --num_gpus 2 pretrain_gpt.py --local_rank 0 --lr 1",
         "NCCL_DEBUG=INFO 'A=b c' torchrun --nproc-per-node 2 pretrain_gpt_moe.py --lr 1"),
        ("deepspeed --num_nodes 4 --num_gpus 8 --master_addr node0 --launcher slurm --ssh_port 2222 pretrain_gpt.py --lr 1",
         "torchrun --nnodes 4 --nproc-per-node 8 --master-addr node0 --node-rank ${NODE_RANK:?} pretrain_gpt_moe.py --lr 1"),
        ("torchrun --nproc_per_node 8 --nnodes=2:4 --standalone ./pretrain_gpt.py --lr 1",
         "torchrun --standalone --nproc-per-node 8 --nnodes 2:4 pretrain_gpt_moe.py --lr 1"),
        ("/opt/env/bin/python -u -m torch.distributed.launch --use_env --nproc_per_node 8 pretrain_gpt.py --local-rank=0 --lr 1",
         "torchrun --nproc-per-node 8 pretrain_gpt_moe.py --lr 1"),
        ("python -u pretrain_gpt.py --lr 1", "python -u pretrain_gpt_moe.py --lr 1"),
        ("python3.11 -m deepspeed.launcher.runner --num_gpus 2 pretrain_gpt.py --lr 1", "torchrun --nproc-per-node 2 pretrain_gpt_moe.py --lr 1"),
    ],
)  # fmt: skip
def test_launcher_options_become_those_of_torchrun(line, command, translated):
    code, _, words, err = translated(line)
    assert (code, err) == (0, "")
    assert sorted(words) == sorted(shlex.split(command))
    assert flags_of(words) == flags_of(shlex.split(command))


def test_hosts_come_from_the_hostfile(translated):
    Path("hosts").write_text("node0 slots=8\n# spare\nnode1 slots=8\n")
    _, table, words, _ = translated("deepspeed --hostfile hosts pretrain_gpt.py --lr 1")
    assert words[1:9] == ["--nnodes", "2", "--nproc-per-node", "8", "--master-addr", "node0", "--node-rank", "${NODE_RANK:?}"]
    assert "started on each: set NODE_RANK to 0 ... 1 there" in table


# ---------------------------------------------------------------- where the line comes from


TEXT = """#!/bin/bash
# the run of last week
mkdir -p out
OMP_NUM_THREADS=2 deepspeed --num_gpus 2 \\
  pretrain_gpt.py --num-experts "[4, 8]" \\
  --save 'my run' 2>&1 | tee out/log.txt
"""


def test_a_line_is_found_in_a_script_with_its_continuations_quotes_and_pipe(capsys):
    Path("launch.sh").write_text(TEXT)
    assert translate_launch.main(["--file", "launch.sh"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("  pretrain_gpt_moe.py \\\n  --num-experts '[4, 8]' \\\n  --save 'my run' 2>&1 | tee out/log.txt\n")
    assert out.splitlines()[-5] == "OMP_NUM_THREADS=2 torchrun \\"


def test_the_output_is_a_script(capsys):
    translate_launch.main(["--", *shlex.split(ALL["gpt-350m-moe-128"].line.replace("--deepspeed_config ds_config.json", ""))])
    Path("new.sh").write_text(capsys.readouterr().out)
    assert subprocess.run(["bash", "-n", "new.sh"], timeout=20).returncode == 0


def test_the_line_may_stand_there_without_dashes_or_come_from_the_standard_input(capsys, monkeypatch):
    import io

    outputs = []
    for argv, text in ((["deepspeed", "pretrain_gpt.py", "--lr", "1"], ""), ([], "deepspeed pretrain_gpt.py --lr 1\n")):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert translate_launch.main(argv) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1] != ""


# ---------------------------------------------------------------- what cannot be translated


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("deepspeed pretrain_gpt.py --hiden-size 3", "unknown flag --hiden-size; did you mean --hidden-size?"),
        ("deepspeed --autotuning run pretrain_gpt.py", "--autotuning run of deepspeed: nothing here tunes settings"),
        ("deepspeed --exclude w:0 pretrain_gpt.py", "--exclude w:0 of deepspeed: which GPUs that leaves is not known here"),
        ("deepspeed -i worker-0:1 pretrain_gpt.py", "--include worker-0:1 of deepspeed: only GPUs of this machine"),
        ("deepspeed --hostfile none pretrain_gpt.py", "--hostfile none of deepspeed: cannot be read here"),
        ("deepspeed --num_gpu 2 pretrain_gpt.py", "--num_gpu 2 of deepspeed: there is no such option; did you mean --num_gpus?"),
        ("deepspeed --num_gpus x pretrain_gpt.py", "--nproc-per-node wants a whole number, not 'x'"),
        ("deepspeed pretrain_bert.py --lr 1", "the program pretrain_bert.py: only GPT pretraining"),
        ("deepspeed --num_gpus 2", "the line names no program"),
        ("mpirun -n 2 python pretrain_gpt.py", "the line begins with 'mpirun', not with deepspeed, torchrun or python"),
        ("torchrun --no-python pretrain_gpt.py", "--no-python of torchrun"),
        ("deepspeed pretrain_gpt.py --deepspeed_config none.json", "--deepspeed_config none.json: the file is not here; say where it is with --json"),
        ("deepspeed pretrain_gpt.py --deepspeed_config", "--deepspeed_config wants a value"),
        ("deepspeed pretrain_gpt.py --config none.yaml", "--config none.yaml: cannot be read: there is no such file"),
        ("deepspeed pretrain_gpt.py --deepspeed_config off.json", "offload_optimizer.device: offload to NVMe is not built yet"),
        ("deepspeed pretrain_gpt.py --lr 0 --topk x", "--lr must be greater than 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_translated_is_named_and_no_command_is_printed(line, said, translated):
    Path("off.json").write_text(json.dumps({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}))
    code, _, words, err = translated(line)
    assert code == 2 and said in err, err
    assert words == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("deepspeed pretrain_gpt.py --lr $LR", "$LR is for a shell to fill in"),
        ('deepspeed pretrain_gpt.py --save "out/${NAME}"', "${NAME} is for a shell to fill in"),
        ("deepspeed pretrain_gpt.py --save `date`", "` is for a shell to fill in"),
        ("deepspeed pretrain_gpt.py --save 'out", "a quote is not closed: 'out"),
        ("deepspeed pretrain_gpt.py\ndeepspeed pretrain_gpt.py", "not 2; give that line alone"),
        ("", "wants one line with deepspeed, torchrun or python, not 0"),
    ],
)
def test_text_that_only_a_shell_understands_is_refused(text, said, capsys):
    Path("line.txt").write_text(text)
    assert translate_launch.main(["--file", "line.txt"]) == 2
    assert said in capsys.readouterr().err


def test_several_parts_that_cannot_be_translated_are_said_at_once(translated):
    Path("ds.json").write_text(json.dumps({"gradient_clipping": 0.5, "zero_optimisation": {}}))
    line = "deepspeed --autotuning run pretrain_gpt.py --clip-grad 1.0 --qqq --deepspeed_config ds.json"
    code, table, _, err = translated(line)
    both = "--clip-grad 1.0 on the command line contradicts gradient_clipping: 0.5 in ds.json"
    assert code == 2 and "4 problems" in err
    assert all(part in err for part in ("--autotuning", "--qqq", "did you mean zero_optimization?", both))
    assert both in table.partition("disagree:")[2]


def test_the_json_may_lie_elsewhere(translated):
    Path("elsewhere.json").write_text(json.dumps({"gradient_clipping": 0.5}))
    code, _, words, _ = translated("deepspeed pretrain_gpt.py --deepspeed_config /nowhere/ds.json", "--json", "elsewhere.json")
    assert (code, flags_of(words)) == (0, ["--clip-grad", "0.5"])
    code, _, _, err = translated("deepspeed pretrain_gpt.py", "--json", "elsewhere.json")
    assert code == 2 and "the line has no --deepspeed_config" in err
    with pytest.raises(SystemExit):
        translated("deepspeed pretrain_gpt.py --deepspeed_config x.json", "--json", "none.json")


# ---------------------------------------------------------------- starting it


def test_what_is_not_built_yet_is_a_note_and_is_refused_when_started(translated):
    line = f"deepspeed --num_gpus 2 pretrain_gpt.py {SMALL} --random-ltd"
    code, table, words, _ = translated(line)
    assert code == 0 and "--random-ltd" in words and "--random-ltd: random layer-token dropping is not built yet" in table
    code, _, _, err = translated(line, "--run")
    assert code == 2 and "--random-ltd: random layer-token dropping" in err


def test_a_layout_that_does_not_fit_and_a_pipe_are_refused_before_anything_starts(translated, capsys):
    code, _, _, err = translated(f"deepspeed --num_gpus 3 pretrain_gpt.py {SMALL} --moe-expert-parallel-size 2", "--run")
    assert code == 2 and "number of ranks (3)" in err
    Path("line.txt").write_text(f"deepspeed pretrain_gpt.py {SMALL} | tee log")
    assert translate_launch.main(["--file", "line.txt", "--run"]) == 2
    assert "'| tee log' is for a shell" in capsys.readouterr().err


def test_several_nodes_take_rank_and_address_from_the_environment(translated, monkeypatch):
    monkeypatch.delenv("NODE_RANK", raising=False)
    code, _, _, err = translated(f"deepspeed --num_nodes 2 --num_gpus 1 --master_addr a pretrain_gpt.py {SMALL}", "--run")
    assert code == 2 and "NODE_RANK is not set" in err


@pytest.mark.parametrize(
    ("line", "started"),
    [
        ("torchrun --nproc_per_node 2 --max-restarts=3 --standalone --master_port 1 pretrain_gpt.py",
         "-m torch.distributed.run --rdzv-backend c10d --rdzv-endpoint D/store --rdzv-conf store_type=file --local-addr 127.0.0.1 "
         "--nproc-per-node 2 --max-restarts 3"),
        ("deepspeed --num_nodes 2 --num_gpus 4 --node_rank 1 --master_addr a pretrain_gpt.py",
         "-m torch.distributed.run --nnodes 2 --nproc-per-node 4 --node-rank 1 --master-addr a"),
        ("python -u pretrain_gpt.py", "-u"),
    ],
)  # fmt: skip
def test_what_is_started_meets_over_a_file_on_one_machine_and_as_said_on_several(line, started):
    result = translate_launch.translate(line.split(), "", None)
    assert sorted(translate_launch.launcher_words(result, "D")) == sorted(started.split())


@pytest.mark.distributed
def test_a_line_with_its_json_trains():
    """Two ranks, ZeRO 2, bf16, everything about the batch and the optimizer from the JSON."""
    content = ds_json(8, 2, 2) | {"fp16": {"enabled": False}, "bf16": {"enabled": True}, "gradient_clipping": 0.5}
    Path("ds.json").write_text(json.dumps(content | {"optimizer": {"type": "Adam", "params": {"lr": 0.003}}}))
    Path("line.txt").write_text(
        f"deepspeed --num_gpus 2 pretrain_gpt.py {SMALL} --moe-expert-parallel-size 2 --save run --deepspeed --deepspeed_config ds.json"
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools/translate_launch.py"), "--file", "line.txt", "--run"],
        capture_output=True, text=True, timeout=200, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.loads(Path("run/config.json").read_text())["config"]
    assert (config["parallel"]["zero_stage"], config["training"]["bf16"], config["training"]["global_batch_size"]) == (2, True, 8)
    assert (config["optimizer"]["clip_grad"], config["optimizer"]["lr"]) == (0.5, 0.003)
    records = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    assert [r["iteration"] for r in records if r["event"] == "train"] == [1, 2]
    assert next(r for r in records if r["event"] == "start")["world_size"] == 2
