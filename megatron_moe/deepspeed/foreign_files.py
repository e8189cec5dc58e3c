"""The files of a DeepSpeed checkpoint, and a reader that executes nothing of what is in them.

SAVE/latest                                                        the newest tag, one line
SAVE/global_step10/mp_rank_00_model_states.pt                      weights but those of experts, counters, schedule, the caller's state
SAVE/global_step10/layer_0_expert_3_mp_rank_00_model_states.pt     expert 3 (of all ranks) of the first MoE module
SAVE/global_step10/expert_3_mp_rank_00_model_states.pt             of older versions: expert 3 of every MoE module
SAVE/global_step10/expp_rank_1_mp_rank_00_optim_states.pt          optimizer without ZeRO, of one expert-parallel rank
SAVE/global_step10/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt  optimizer with ZeRO (or bf16), of one data rank

They are pickles, and whoever writes one can have any function called when a plain reader opens it. Here torch's restricted reader
makes tensors, numbers, text and containers. Objects of the classes that DeepSpeed and Megatron put into their files become an
`Inert` each, which keeps what it is given and does nothing; a file with any other class is refused, by the name of the class.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_moe.checkpoint.files import CheckpointError

LATEST = "latest"
MODEL_FILE = "mp_rank_00_model_states.pt"

_NUMPY = ("_reconstruct", "scalar", "_frombuffer")
_MEANINGLESS = (  # classes whose objects say nothing that is needed here
    "argparse.Namespace",  # Megatron's arguments
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "megatron.enums.AttnMaskType",
    "megatron.enums.AttnType",
    "megatron.enums.LayerType",
    "megatron.enums.PositionEmbeddingType",
    "megatron.model.enums.AttnMaskType",
    "megatron.model.enums.AttnType",
    "megatron.model.enums.LayerType",
    "megatron.model.enums.ModelType",
    "megatron.model.enums.PositionEmbeddingType",
    "megatron.core.enums.ModelType",
    "numpy.dtype",  # states of numpy's generator
    "numpy.ndarray",
    *(f"{module}.{name}" for module in ("numpy.core.multiarray", "numpy._core.multiarray") for name in _NUMPY),
    *(f"{module}.{name}" for module in ("numpy.core.numeric", "numpy._core.numeric") for name in _NUMPY),
)


class Inert:
    """In place of an object of another program: it has its arguments and its state, and no behaviour."""

    path = ""  # the class it stands for

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        made = super().__new__(cls)
        made.args, made.state = args, None
        return made

    def __init__(self, *args: Any, **_: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state


def read_file(path: Path, ignored: Sequence[str] = ()) -> dict[str, Any]:
    """What is in one file, tensors on the CPU. `ignored`: further classes whose objects become inert."""
    stand_ins = [(type("Inert", (Inert,), {"path": name}), name) for name in (*_MEANINGLESS, *ignored)]
    try:
        with torch.serialization.safe_globals(stand_ins):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing") from None
    except Exception as error:  # damaged bytes raise nearly anything
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            name = named[1] if "." in named[1] else f"builtins.{named[1]}"
            raise CheckpointError(
                f"{path}: has an object of {name}, which is neither a tensor nor plain data; nothing was executed. If it is a class of "
                f'your own in the saved client_state, give ignore_classes=["{name}"]: such objects are then left out'
            ) from None
        raise CheckpointError(f"{path}: cut off, damaged, or not a file of torch.save ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, DeepSpeed's files hold a dict")
    return content


def is_plain(value: Any) -> bool:
    """Tensors, numbers, text and containers of them."""
    if isinstance(value, dict):
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes, Tensor))


# ---------------------------------------------------------------- which files there are


@dataclass
class Files:
    """What a tag's directory holds, by the numbers in the names."""

    path: Path
    experts: dict[tuple[int, int], Path] = field(default_factory=dict)  # (MoE module, expert)
    old_experts: dict[int, Path] = field(default_factory=dict)  # expert, of all modules
    optimizer: dict[int, Path] = field(default_factory=dict)  # expert-parallel rank
    zero: dict[int, Path] = field(default_factory=dict)  # data rank

    @property
    def model(self) -> Path:
        return self.path / MODEL_FILE


def tags_in(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob(f"*/{MODEL_FILE}"))


def find_files(directory: str | Path, tag: str | None = None) -> Files:
    """The files of a tag, without one of that in `latest`. CheckpointError for files of a layout that is not read."""
    path = Path(directory) / (_latest(Path(directory)) if tag is None else str(tag))
    if not path.is_dir():
        raise CheckpointError(f"{path}: not there; {_tags_text(Path(directory))}")
    files = Files(path)
    for entry in sorted(path.iterdir()):
        _sort_in(files, entry)
    if not files.model.is_file():
        raise CheckpointError(f"{files.model}: missing; {_why_without_model(path)}")
    return files


def _latest(directory: Path) -> str:
    try:
        tag = (directory / LATEST).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{directory / LATEST}: cannot be read ({error}); give a tag. {_tags_text(directory)}") from None
    if not tag or Path(tag).name != tag:
        raise CheckpointError(f"{directory / LATEST}: says {tag!r}, which is not the name of a folder beside it")
    return tag


def _tags_text(directory: Path) -> str:
    tags = tags_in(directory)
    return f"tags in {directory}: {', '.join(tags)}" if tags else f"{directory} holds no checkpoint of DeepSpeed"


_PATTERNS = {
    "experts": r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt",
    "old_experts": r"expert_(\d+)_mp_rank_(\d+)_model_states\.pt",
    "optimizer": r"expp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt",
    "zero": r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_?optim_states\.pt",
    "model": r"mp_rank_(\d+)_model_states\.pt",
}


def _sort_in(files: Files, entry: Path) -> None:
    for kind, pattern in _PATTERNS.items():
        if match := re.fullmatch(pattern, entry.name):
            *numbers, mp_rank = map(int, match.groups())
            if mp_rank:
                raise CheckpointError(
                    f"{entry}: was saved under model parallelism, and how a module of yours is cut is known to that module alone; "
                    f"save it with one model-parallel rank"
                )
            if kind != "model":
                getattr(files, kind)[tuple(numbers) if len(numbers) > 1 else numbers[0]] = entry
            return


def _why_without_model(path: Path) -> str:
    if any(path.glob("iter_*/manifest.json")):
        return "engine.save_checkpoint of this package has written it, and engine.load_checkpoint reads it"
    if any(path.glob("zero_pp_rank_*_model_states.pt")):
        return "the weights were saved in pieces by ZeRO stage 3, which DeepSpeed's MoE has not; join them with its zero_to_fp32.py"
    if any(path.glob("layer_*-model_*_model_states.pt")):
        return "it was saved by DeepSpeed's pipeline engine, whose layers have no names of the module; save it without pipeline"
    return f"there are {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'no files'}"
