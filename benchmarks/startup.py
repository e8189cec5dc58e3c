"""start-up: --help, --dry-run and the first step of --preset tiny, against `import torch` and the same of other frameworks

Each system is a command in a process of its own, whose files are in the page cache (one warm-up). "first step" is a whole command that
trains one step of a small mixture of experts and ends, without evaluation. Compared with transformers, whose Mixtral of the same widths,
experts and tokens takes one step of AdamW, and with the imports that others need before they can begin.
"""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

from benchmarks.harness import Options, Report, System, interleave, missing, paired_ratio, timing_table

PEERS = {
    "transformers": "Mixtral: import, and one step of the same size",
    "deepspeed": "import",
    "megatron.core": "import of its GPT model",
    "torchtitan": "import of its trainer",
}
ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 7
TORCH = "import torch"
TRAIN = "pretrain_gpt_moe.py --preset tiny --mock-data"
OURS = {
    "ours: --help": "pretrain_gpt_moe.py --help",
    "ours: import of the trainer": "-c import megatron_moe.training.pretrain",
    "ours: --dry-run": f"{TRAIN} --dry-run",
    "ours: first step": f"{TRAIN} --train-iters 1 --eval-iters 0",
}
MIXTRAL = """
import torch
from transformers import MixtralConfig, MixtralForCausalLM
config = MixtralConfig(vocab_size=512, hidden_size=128, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4,
                       num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=1, max_position_embeddings=128)
model = MixtralForCausalLM(config)
optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
for _ in range(2):
    tokens = torch.randint(512, (4, 128))
    model(tokens, labels=tokens).loss.backward()
torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
optimizer.step()
"""
IMPORTS = {
    "transformers": "from transformers import MixtralForCausalLM",
    "deepspeed": "import deepspeed",
    "megatron.core": "from megatron.core.models.gpt import GPTModel",
    "torchtitan": "import torchtitan.train",
}


def commands(skipped: dict[str, str]) -> dict[str, list[str]]:
    """By system: what stands behind the interpreter."""
    found = {TORCH: ["-c", TORCH]}
    found |= {name: ["-c", text[3:]] if text.startswith("-c ") else text.split() for name, text in OURS.items()}
    found |= {f"{peer}: import": ["-c", IMPORTS[peer]] for peer in PEERS if peer not in skipped}
    if "transformers" not in skipped:
        found["transformers: first step"] = ["-c", MIXTRAL]
    return found


def call(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)[:80]} ended with code {done.returncode}:\n{done.stderr[-2000:]}")


def reasons() -> dict[str, str]:
    """Peers that are not here, or that cannot be imported as they are."""
    skipped = missing(PEERS)
    for peer in PEERS:
        if peer not in skipped:
            try:
                call(["-c", IMPORTS[peer]])
            except RuntimeError as error:
                skipped[peer] = f"its import fails: {str(error).splitlines()[-1]}"
    return skipped


def run(options: Options) -> Report:
    rounds, skipped = options.rounds_or(ROUNDS), reasons()
    systems = commands(skipped)
    report = Report("startup", {"rounds": rounds, "threads": 1}, skipped)
    samples = interleave([System(name, partial(call, words)) for name, words in systems.items()], rounds)
    report.samples["whole commands"] = samples
    for clock in ("cpu", "wall"):
        report.figures[f"{clock} over import torch"] = {name: paired_ratio(samples, name, TORCH, clock)._asdict() for name in systems}
    report.tables.append(timing_table(samples, TORCH))
    return report
