"""What DeepSpeed's mixture-of-experts tutorials have a reader write, in our words; of a script for DeepSpeed only the imports differ.

A block is a network, what it is given, its loss, and what is handed to `initialize`. Nothing here knows of ranks or sharding.
"""
# B images or sequences, S tokens each, D hidden

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron_moe import deepspeed
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.moe.utils import is_moe_param, split_params_into_different_moe_groups_for_optimizer

EXPERTS = 8


# ---------------------------------------------------------------- a layer is replaced


class Classifier(nn.Module):
    """The image classifier: a linear layer of 84 becomes 8 of them, and a new last layer comes behind."""

    def __init__(self, **moe: Any):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)
        self.pool = nn.MaxPool2d(2, 2)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * 5 * 5, 120)
        self.fc2 = nn.Linear(120, 84)
        fc3 = nn.Linear(84, 84)
        self.fc3 = MoE(hidden_size=84, expert=fc3, num_experts=EXPERTS, k=1, **moe)
        self.fc4 = nn.Linear(84, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pool(F.relu(self.conv1(x)))
        x = self.pool(F.relu(self.conv2(x)))
        x = x.view(-1, 16 * 5 * 5)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        x, _, _ = self.fc3(x)
        return self.fc4(x)

    @staticmethod
    def batch(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randn(12, 3, 32, 32, generator=draw), torch.randint(10, (12,), generator=draw)

    @staticmethod
    def loss(net: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        criterion = nn.CrossEntropyLoss()
        return criterion(net(inputs), labels)


# ---------------------------------------------------------------- a transformer, with its balance loss


class MoETransformerBlock(nn.Module):
    """torch's own attention, and experts in place of the MLP."""

    def __init__(self, hidden_size: int, num_heads: int, **moe: Any):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        expert = nn.Sequential(nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size))
        self.moe = MoE(hidden_size=hidden_size, expert=expert, num_experts=EXPERTS, **moe)
        self.norm1 = nn.LayerNorm(hidden_size)
        self.norm2 = nn.LayerNorm(hidden_size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        attended, _ = self.attention(x, x, x, need_weights=False)
        x = self.norm1(x + attended)
        routed, moe_loss, _ = self.moe(x)
        return self.norm2(x + routed), moe_loss


class MoETransformer(nn.Module):
    def __init__(self, vocab_size: int = 40, hidden_size: int = 16, num_heads: int = 4, num_layers: int = 2, **moe: Any):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList(MoETransformerBlock(hidden_size, num_heads, **moe) for _ in range(num_layers))
        self.head = nn.Linear(hidden_size, vocab_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x, moe_loss = self.embedding(tokens), 0.0
        for block in self.blocks:
            x, block_loss = block(x)
            moe_loss = moe_loss + block_loss
        return self.head(x), moe_loss

    @staticmethod
    def batch(draw: torch.Generator) -> tuple[Tensor, Tensor]:
        return torch.randint(40, (3, 10), generator=draw), torch.randint(40, (3, 10), generator=draw)

    @staticmethod
    def loss(net: Any, inputs: Tensor, labels: Tensor) -> Tensor:
        logits, moe_loss = net(inputs)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return loss + 0.01 * moe_loss


# ---------------------------------------------------------------- Switch Transformer


class SwitchBlock(nn.Module):
    """Norm before each part, one expert per token, and a plain MLP in every other block."""

    def __init__(self, hidden_size: int, num_heads: int, is_moe: bool, **moe: Any):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        ffn = nn.Sequential(nn.Linear(hidden_size, 4 * hidden_size), nn.ReLU(), nn.Linear(4 * hidden_size, hidden_size))
        self.is_moe = is_moe
        self.ffn = MoE(hidden_size=hidden_size, expert=ffn, num_experts=EXPERTS, **moe) if is_moe else ffn

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.norm1(x)
        x = x + self.attention(h, h, h, need_weights=False)[0]
        h = self.norm2(x)
        if not self.is_moe:
            return x + self.ffn(h), x.new_zeros(())
        h, l_aux, _ = self.ffn(h)
        return x + h, l_aux


class SwitchTransformer(nn.Module):
    def __init__(self, vocab_size: int = 40, hidden_size: int = 16, num_heads: int = 2, num_layers: int = 4, **moe: Any):
        super().__init__()
        moe = {"k": 1, "capacity_factor": 1.25, "eval_capacity_factor": 2.0, "min_capacity": 2} | moe
        self.embedding = nn.Embedding(vocab_size, hidden_size)
        self.blocks = nn.ModuleList(SwitchBlock(hidden_size, num_heads, i % 2 == 1, **moe) for i in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(tokens)
        losses = []
        for block in self.blocks:
            x, l_aux = block(x)
            losses.append(l_aux)
        return F.linear(self.norm(x), self.embedding.weight), torch.stack(losses).sum()

    batch = MoETransformer.batch
    loss = MoETransformer.loss


# ---------------------------------------------------------------- parameter groups


def create_moe_param_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Two groups, by looking at each module's own parameters."""
    params_with_weight_decay: dict[str, Any] = {"params": [], "weight_decay": 0.1}
    moe_params_with_weight_decay: dict[str, Any] = {"params": [], "weight_decay": 0.1, "moe": True, "name": "weight_decay_moe_params"}
    for module in model.modules():
        own = [p for p in module._parameters.values() if p is not None]
        moe_params_with_weight_decay["params"].extend(p for p in own if is_moe_param(p))
        params_with_weight_decay["params"].extend(p for p in own if not is_moe_param(p))
    return [params_with_weight_decay, moe_params_with_weight_decay]


def create_split_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The same with the function for it: the way of newer DeepSpeed."""
    return split_params_into_different_moe_groups_for_optimizer({"params": list(model.parameters()), "name": "parameters"})


# ---------------------------------------------------------------- the loop


def train(engine: Any, batches: Iterable[tuple[Tensor, Tensor]], loss_of: Any) -> list[float]:
    """The engine loop: forward, backward, step."""
    losses = []
    for data in batches:
        inputs, labels = data[0].to(engine.device), data[1].to(engine.device)
        loss = loss_of(engine, inputs, labels)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def start(model: nn.Module, config: dict[str, Any], model_parameters: Any = None) -> Any:
    parameters = [p for p in model.parameters() if p.requires_grad] if model_parameters is None else model_parameters
    model_engine, _, _, _ = deepspeed.initialize(args=None, model=model, model_parameters=parameters, config=config)
    return model_engine
