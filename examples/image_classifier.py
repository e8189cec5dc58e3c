"""The image classifier of DeepSpeed's mixture-of-experts tutorial, with its flags, on our engine.

    python examples/image_classifier.py --epochs 20                                            dense
    python examples/image_classifier.py --epochs 20 --moe --num-experts 8
    torchrun --nproc-per-node 4 examples/image_classifier.py --moe --ep-world-size 2 --num-experts 8 --moe-param-group --stage 2

Images: the 1797 handwritten digits of 8 x 8 points that scikit-learn ships, or CIFAR-10 with `--data FOLDER`, where FOLDER holds the
files of its python version (data_batch_1 ... data_batch_5, test_batch). Those are pickles: they are read by a reader that can make
arrays and plain containers, and nothing else.

Against a script for DeepSpeed only the imports are others. docs/from_deepspeed.md walks through it.
"""

from __future__ import annotations

import argparse
import pickle
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the package need not be installed

from tqdm import tqdm

from megatron_moe import deepspeed
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

CLASSES = 10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


# ---------------------------------------------------------------- the model


class Net(nn.Module):
    """Two convolutions and three linear layers; with --moe the last hidden one is a MoE layer, or several."""

    def __init__(self, channels: int, side: int, args: argparse.Namespace):
        super().__init__()
        kernel, padding = (5, 0) if side >= 32 else (3, 1)  # of the tutorial's 32 x 32 points; 8 x 8 are too few for that
        self.conv1 = nn.Conv2d(channels, 6, kernel, padding=padding)
        self.conv2 = nn.Conv2d(6, 16, kernel, padding=padding)
        self.fc1 = nn.Linear(self.features(torch.zeros(1, channels, side, side)).shape[1], 120)
        self.fc2 = nn.Linear(120, 84)
        self.moe_layers = nn.ModuleList()
        if args.moe:
            for num_experts in args.num_experts:
                self.moe_layers.append(
                    MoE(
                        hidden_size=84,
                        expert=nn.Linear(84, 84),
                        num_experts=num_experts,
                        ep_size=args.ep_world_size,
                        use_residual=args.mlp_type == "residual",
                        k=args.top_k,
                        noisy_gate_policy=args.noisy_gate_policy,
                        **capacity_of(args),
                    )
                )
            self.fc4 = nn.Linear(84, CLASSES)
        else:
            self.fc3 = nn.Linear(84, CLASSES)

    def features(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return x.flatten(1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(logits, balance loss of the MoE layers)."""
        x = F.relu(self.fc1(self.features(x)))
        x = F.relu(self.fc2(x))
        balance = x.new_zeros((), dtype=torch.float32)
        for layer in self.moe_layers:
            x, l_aux, _ = layer(x)
            balance = balance + l_aux
        return (self.fc4(x) if len(self.moe_layers) else self.fc3(x)), balance


def capacity_of(args: argparse.Namespace) -> dict[str, Any]:
    """Nothing leads around these layers: an image that its expert has no place for leaves them as zeros. So all have one by default."""
    if args.capacity_factor is None and args.min_capacity is None:
        return {"drop_tokens": False}
    factor = args.capacity_factor or 1.0
    return {"capacity_factor": factor, "eval_capacity_factor": factor, "min_capacity": args.min_capacity or 0}


# ---------------------------------------------------------------- the images


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images and labels for training, images and labels for the test: four of five, and the fifth, in an order drawn once."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SystemExit("scikit-learn ships the images: pip install scikit-learn; or give --data FOLDER with CIFAR-10") from None
    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1  # points are 0 to 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    test = len(labels) // 5
    return images[order[test:]], labels[order[test:]], images[order[:test]], labels[order[:test]]


def cifar(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the files of CIFAR-10's python version; `folder` may also be the one that they are in when unpacked."""
    folder = folder / "cifar-10-batches-py" if (folder / "cifar-10-batches-py").is_dir() else folder
    parts = [read_batch(folder / f"data_batch_{i}") for i in range(1, 6)]
    images, labels = (torch.cat(tensors) for tensors in zip(*parts))
    return images, labels, *read_batch(folder / "test_batch")


def read_batch(path: Path) -> tuple[Tensor, Tensor]:
    """Images [n, 3, 32, 32] from -1 to 1, and labels [n]."""
    try:
        with open(path, "rb") as file:
            content = ArrayUnpickler(file, encoding="bytes").load()
        images, labels = np.asarray(content[b"data"]), np.asarray(content[b"labels"])
    except OSError as error:
        raise SystemExit(f"--data: {error}; the python version of CIFAR-10 has data_batch_1 to data_batch_5 and test_batch") from None
    except Refused as error:
        raise SystemExit(f"--data: {path}: {error}") from None
    except Exception as error:  # damaged bytes raise nearly anything
        raise SystemExit(f"--data: {path}: damaged, or no file of CIFAR-10 ({type(error).__name__}: {error})") from None
    if (
        images.dtype != np.uint8
        or images.shape != (len(labels), 3072)
        or labels.dtype.kind not in "iu"
        or not np.isin(labels, range(10)).all()
    ):
        raise SystemExit(
            f"--data: {path}: wants n x 3072 bytes and n labels from 0 to 9, not {images.dtype} {images.shape} and {labels.shape}"
        )
    return torch.tensor(images).view(-1, 3, 32, 32).float() / 127.5 - 1, torch.tensor(labels, dtype=torch.int64)


class Refused(pickle.UnpicklingError):
    """What a pickle asks for is more than data."""


class ArrayUnpickler(pickle.Unpickler):
    """Makes numpy arrays, numbers, text and containers; a pickle that names anything else is refused and runs nothing."""

    ALLOWED = {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),  # bytes, as Python 2 and old protocols wrote them
        *((module, "_reconstruct") for module in ("numpy.core.multiarray", "numpy._core.multiarray")),
        *((module, "_frombuffer") for module in ("numpy.core.numeric", "numpy._core.numeric")),
    }

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise Refused(f"would import {module}.{name}, and images need arrays alone; nothing was executed")
        return super().find_class(module.replace("numpy.core.", "numpy._core.") if hasattr(np, "_core") else module, name)


# ---------------------------------------------------------------- flags


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="image classifier, dense or with experts", allow_abbrev=False)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--log-interval", type=int, default=20, help="steps between two looks at the loss")
    parser.add_argument("--dtype", choices=DTYPES, help="fp32 when not given")
    parser.add_argument("--stage", type=int, choices=range(4), help="ZeRO; 0 when not given")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="CIFAR-10's python files; without it scikit-learn's digits")
    parser.add_argument("--with_cuda", action="store_true", help="stop when there is no GPU, instead of using the CPU")
    parser.add_argument("--moe", action="store_true", help="experts in place of the last hidden layer")
    parser.add_argument("--ep-world-size", type=int, default=1, help="ranks that share the experts of a layer")
    parser.add_argument("--num-experts", type=int, nargs="+", default=[1], help="of each MoE layer")
    parser.add_argument("--mlp-type", choices=("standard", "residual"), default="standard")
    parser.add_argument("--top-k", type=int, default=1, help="experts of an image")
    parser.add_argument("--capacity-factor", type=float, help="an expert takes so many times its even share of a batch at most; "
                        "not given, with --min-capacity neither, it takes all")  # fmt: skip
    parser.add_argument("--min-capacity", type=int, help="rows that every expert takes, whatever the capacity factor (1.0 then) says")
    parser.add_argument("--noisy-gate-policy", choices=("None", "RSample", "Jitter"))
    parser.add_argument("--moe-param-group", action="store_true", help="make the optimizer's groups of experts here, not in the engine")
    parser.add_argument("--moe-loss-coeff", type=float, default=0.01, help="weight of the balance loss")
    deepspeed.add_config_arguments(parser)  # --deepspeed, --deepspeed_config
    args = parser.parse_args(argv)
    if not args.moe and (alone := [flag for flag in MOE_FLAGS if getattr(args, flag) != parser.get_default(flag)]):
        parser.error(f"--{alone[0].replace('_', '-')} says how experts are used, and there are none: add --moe")
    if args.deepspeed_config and (args.dtype or args.stage is not None):
        parser.error("--dtype and --stage are written in the JSON of --deepspeed_config; leave them out")
    if args.with_cuda and not torch.cuda.is_available():
        parser.error("--with_cuda, and torch finds no GPU; leave it out to use the CPU")
    return args


MOE_FLAGS = (
    "ep_world_size", "num_experts", "mlp_type", "top_k", "capacity_factor", "min_capacity", "noisy_gate_policy", "moe_param_group",
    "moe_loss_coeff",
)  # fmt: skip


BATCH = 32


def config_of(args: argparse.Namespace, images: int) -> dict[str, Any]:
    """The tutorial's JSON but for the schedule: its warm-up of 1000 steps is more than the digits have."""
    steps = args.epochs * -(-images // BATCH)
    rates = {"warmup_min_lr": 0, "warmup_max_lr": 0.002, "warmup_num_steps": min(50, steps // 2), "total_num_steps": steps}
    return {
        "train_batch_size": BATCH,
        "steps_per_print": 100000,
        "optimizer": {"type": "Adam", "params": {"lr": 0.002, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 3e-7}},
        "scheduler": {"type": "WarmupDecayLR", "params": rates},
        "gradient_clipping": 1.0,
        "bf16": {"enabled": args.dtype == "bf16"},
        "fp16": {"enabled": args.dtype == "fp16", "loss_scale": 0, "initial_scale_power": 15, "loss_scale_window": 500},
        "zero_optimization": {"stage": args.stage or 0},
    }


def parameters_of(net: nn.Module, args: argparse.Namespace) -> Any:
    """Of the network, or the groups that the engine would otherwise make of them."""
    trainable = [p for p in net.parameters() if p.requires_grad]
    if not args.moe_param_group:
        return trainable
    return split_params_into_different_moe_groups_for_optimizer({"params": trainable, "name": "parameters"})


# ---------------------------------------------------------------- training


def train(args: argparse.Namespace) -> float:
    """The share of the test images that is recognised after the last epoch, equal on all ranks."""
    deepspeed.init_distributed()
    torch.manual_seed(args.seed)
    images, labels, test_images, test_labels = cifar(args.data) if args.data else digits()
    net = Net(images.shape[1], images.shape[2], args)
    engine, _, loader, _ = deepspeed.initialize(
        args=args,
        model=net,
        model_parameters=parameters_of(net, args),
        training_data=TensorDataset(images, labels),
        config=None if args.deepspeed_config else config_of(args, len(labels)),
    )
    dtype = torch.float16 if engine.fp16_enabled() else torch.bfloat16 if engine.bfloat16_enabled() else torch.float32
    is_first, steps = dist.get_rank() == 0, 0
    with tqdm(total=args.epochs * len(loader), unit="step", disable=not is_first, mininterval=0.5) as bar:
        for epoch in range(args.epochs):
            for x, y in loader:
                logits, balance = engine(x.to(engine.device, dtype))
                loss = F.cross_entropy(logits.float(), y.to(engine.device)) + args.moe_loss_coeff * balance
                engine.backward(loss)
                engine.step()
                bar.update()
                steps += 1
                if is_first and steps % args.log_interval == 0:  # the host waits for the loss: not after every step
                    bar.set_postfix(epoch=epoch + 1, loss=f"{loss.item():.3f}")
    return evaluate(engine, test_images, test_labels, dtype)


@torch.no_grad()
def evaluate(engine: Any, images: Tensor, labels: Tensor, dtype: torch.dtype) -> float:
    """Every rank takes a share, all in equally many batches: they exchange images in the MoE layers."""
    engine.eval()
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = -(-len(labels) // (world * 256))
    right = torch.zeros((), dtype=torch.int64, device=engine.device)
    for share in torch.arange(len(labels)).tensor_split(world)[rank].tensor_split(batches):
        logits, _ = engine(images[share].to(engine.device, dtype))
        right += (logits.argmax(1) == labels[share].to(engine.device)).sum()
    dist.all_reduce(right)
    engine.train()
    return right.item() / len(labels)


def main() -> None:
    args = parse()
    accuracy = train(args)
    if dist.get_rank() == 0:
        print(f"{'experts' if args.moe else 'dense'}: {accuracy:.2%} of the test images recognised after {args.epochs} epochs")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
