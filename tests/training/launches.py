"""Real runs in processes of their own: under torchrun as scripts/common.sh starts it, or plain python."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from megatron_moe.metrics.reader import read_records

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "pretrain_gpt_moe.py"
FAULTY = ROOT / "tests" / "training" / "faulty_run.py"
TINY = (
    "--mock-data --vocab-size 64 --num-layers 2 --expert-interval 1 --num-experts 2 4 --hidden-size 32 --num-attention-heads 4 "
    "--seq-length 16 --max-position-embeddings 16 --micro-batch-size 2 --lr 1e-2 --hidden-dropout 0.1 --eval-iters 1 --log-interval 1 "
    "--num-workers 0"
)


def start(
    flags: str, *, ranks: int = 1, scratch: Path, program: Path = PROGRAM, torchrun: str = "", **environment: str
) -> subprocess.Popen:
    """One rank is started without torchrun. Output goes to `scratch`/output: a pipe that nobody reads would stop the run."""
    words = [str(program), *flags.split()]
    if ranks > 1:
        meet = ["--rdzv-backend", "c10d", "--rdzv-endpoint", str(scratch / "store"), "--rdzv-conf", "store_type=file"]
        words = [
            "-m",
            "torch.distributed.run",
            *meet,
            "--local-addr",
            "127.0.0.1",
            "--nproc-per-node",
            str(ranks),
            *torchrun.split(),
            *words,
        ]
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "CUDA_VISIBLE_DEVICES": ""} | environment
    with open(output_file(scratch), "w") as output:
        return subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT)


def output_file(scratch: Path) -> Path:
    return scratch / "output"


def output(scratch: Path) -> str:
    return output_file(scratch).read_text(errors="replace")


def end(process: subprocess.Popen, scratch: Path, seconds: float = 120) -> tuple[int, str]:
    """Wait for its end; exit code and output."""
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        raise AssertionError(f"did not end within {seconds:g} s\n{output(scratch)[-5000:]}") from None
    return code, output(scratch)


def clear(process: subprocess.Popen) -> None:
    """Whatever has become of the test: no process of it stays."""
    for pid in workers_of(process):
        kill(pid)
    process.kill()
    process.wait()


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, 9)


def wait_until(condition: Callable[[], object], what: str, process: subprocess.Popen, scratch: Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, f"ended with {process.returncode} before {what}\n{output(scratch)[-5000:]}"
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}\n{output(scratch)[-5000:]}"
        time.sleep(0.002)


def records(save: Path, event: str | None = None) -> list[dict]:
    path = save / "metrics.jsonl"
    found = read_records(path) if path.exists() else []
    return [r for r in found if event in (None, r["event"])]


def workers_of(process: subprocess.Popen) -> list[int]:
    """Process ids of the ranks under a torchrun, in rank order."""
    pids: dict[int, int] = {}
    for pid in children_of(process.pid):
        settings = dict(word.partition("=")[::2] for word in _read(Path(f"/proc/{pid}/environ")).split("\0"))
        if "RANK" in settings:
            pids[int(settings["RANK"])] = pid
    return [pids[rank] for rank in sorted(pids)]


def children_of(pid: int) -> list[int]:
    return [int(child) for children in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(children).split()]


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return ""  # gone meanwhile
