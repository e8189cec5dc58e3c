"""How busy every expert of a checkpoint was: as its run has written it down, or as it is on a text."""
# E experts

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megatron_moe.conversion.source import Source
from megatron_moe.conversion.verify import logits
from megatron_moe.metrics.reader import read_records, valid_history
from megatron_moe.model.gpt import GPT
from megatron_moe.moe.layer import moe_layers

Loads = dict[int, list[float]]  # layer -> share of the assignments of each expert, adding up to 1
LAST = 10  # logged steps that are averaged
ROWS_AT_ONCE = 1024  # tokens whose logits are there together


def recorded(metrics: Path, iteration: int, experts: dict[int, int]) -> tuple[Loads, int] | None:
    """Mean over the last logged steps up to `iteration`, and how many these were; None where there is none.

    experts: layer -> number of experts. Steps that were logged with other numbers, before an edit say, do not count.
    """
    if not metrics.is_file():
        return None
    steps = [r for r in valid_history(read_records(metrics)) if r["event"] == "train" and r["iteration"] <= iteration]
    found = [{m["layer"]: m["expert_load"] for m in r.get("moe", []) if m.get("expert_load")} for r in steps]
    found = [loads for loads in found if {layer: len(shares) for layer, shares in loads.items()} == experts][-LAST:]
    if not found:
        return None
    return {layer: [sum(column) / len(found) for column in zip(*(loads[layer] for loads in found))] for layer in experts}, len(found)


def measured(model: GPT) -> Loads:
    """Of all that the model has been asked since it was made; without the blocks of multi-token prediction, which answer nothing."""
    return {moe.layer: (moe.stats.counts_E / moe.stats.counts_E.sum()).tolist() for moe in moe_layers(model) if moe.stats.sums is not None}


@torch.no_grad()
def read_text(model: GPT, source: Source, tokens_BS: Tensor) -> tuple[Tensor, float]:
    """(logits of the first rows, mean loss of all in nats per token) of the model filled from the source, a few rows at a time.

    What its experts were asked to do is in `measured(model)`.
    """
    rows = max(1, ROWS_AT_ONCE // tokens_BS.shape[1])
    first_BSV = logits(model, source, tokens_BS[:rows])  # fills the model
    losses = [_losses(model, first_BSV, tokens_BS[:rows])]
    for part_BS in tokens_BS[rows:].split(rows) if len(tokens_BS) > rows else ():
        losses.append(_losses(model, model(part_BS, torch.arange(part_BS.shape[1]).expand_as(part_BS)), part_BS))
    return first_BSV, float(torch.cat(losses).double().mean())


def _losses(model: GPT, logits_BSV: Tensor, tokens_BS: Tensor) -> Tensor:
    return model.token_losses(logits_BSV[:, :-1], tokens_BS[:, 1:], model.vocab_size).flatten()
