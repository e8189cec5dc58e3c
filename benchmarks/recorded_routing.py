"""What routers of trained models did, for benchmarks/moe_layer.py: python -m benchmarks.recorded_routing writes it once more

Three small models (8, 64 and 256 experts, top-2, balance loss 0.01) learn Python's standard library byte by byte; then their last
layer routes 4096 bytes that it has not seen. The expert numbers, uint8 [4096, 2] each, are kept beside this file.
"""
# T tokens, E experts

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from megatron_moe.config.model import ModelConfig
from megatron_moe.config.moe import MoEConfig
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import moe_layers

RECORDED = Path(__file__).parent / "recorded_routing.npz"
STEPS, BATCH, SEQUENCE, TOKENS = 300, 8, 128, 4096


def main() -> None:
    text = _text()
    np.savez_compressed(RECORDED, **{str(E): routed(E, text) for E in (8, 64, 256)})


def _text() -> np.ndarray:
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return np.frombuffer(b"\0".join(f.read_bytes() for f in files), np.uint8)


def routed(num_experts: int, text: np.ndarray) -> np.ndarray:
    """Of a model that was trained here."""
    torch.manual_seed(0)
    draw = np.random.default_rng(0)
    config = ModelConfig(num_layers=2, hidden_size=64, num_attention_heads=4, ffn_hidden_size=32, max_position_embeddings=SEQUENCE,
                         hidden_dropout=0.0, attention_dropout=0.0)  # fmt: skip
    gpt = GPT(config, MoEConfig(num_experts=(num_experts,), topk=2, moe_token_dropping=False, moe_loss_coeff=0.01), 256)
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3)
    learnt = len(text) * 9 // 10
    for step in range(STEPS):
        starts = draw.integers(0, learnt - SEQUENCE - 1, BATCH)
        for moe in moe_layers(gpt):
            moe.begin_step(1.0 / (BATCH * SEQUENCE))
        loss = gpt(*_batch(text, starts)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0 or step == STEPS - 1:
            print(f"{num_experts} experts, step {step}: loss {loss.item():.3f}")
    last, ids = moe_layers(gpt)[-1], []
    route = last.route
    last.route = lambda *a: (r := route(*a), ids.append(r[0].ids_TK))[0]
    gpt.eval()
    with torch.no_grad():
        gpt(*_batch(text, learnt + np.arange(TOKENS // SEQUENCE) * SEQUENCE))
    return torch.cat(ids).numpy().astype(np.uint8)


def _batch(text: np.ndarray, starts: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, positions, labels."""
    rows = torch.from_numpy(np.stack([text[s : s + SEQUENCE + 1] for s in starts]).astype(np.int64))
    return rows[:, :-1], torch.arange(SEQUENCE).expand(len(rows), -1), rows[:, 1:]


if __name__ == "__main__":
    main()
