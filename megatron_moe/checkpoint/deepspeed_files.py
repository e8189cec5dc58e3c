"""The files of a DeepSpeed checkpoint, and a reader that executes nothing of what is in them.

SAVE/latest                                                        the newest tag, one line
SAVE/global_step10/mp_rank_00_model_states.pt                      weights but those of experts, counters, schedule, the caller's state
SAVE/global_step10/layer_0_expert_3_mp_rank_00_model_states.pt     expert 3 (of all ranks) of the first MoE module
SAVE/global_step10/expert_3_mp_rank_00_model_states.pt             of older versions: expert 3 of every MoE module
SAVE/global_step10/expp_rank_1_mp_rank_00_optim_states.pt          optimizer without ZeRO, of one expert-parallel rank
SAVE/global_step10/bf16_zero_pp_rank_2_mp_rank_00_optim_states.pt  optimizer with ZeRO (or bf16), of one data rank

mp_rank_XX is the model-parallel (tensor-parallel) rank. They are pickles, and whoever writes one can have any function called when a plain reader opens it. Here torch's restricted reader
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

from megatron_moe.checkpoint.files import CheckpointError

LATEST = "latest"
MODEL_FILE = "mp_rank_00_model_states.pt"

_NUMPY = ("_reconstruct", "scalar", "_frombuffer")
_MEANINGLESS = (  # classes whose objects say nothing that is needed here
    "argparse.Namespace",  # Megatron's arguments
    "types.SimpleNamespace",
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
    import torch  # here: the names of files are asked for without it

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
    from torch import Tensor

    if isinstance(value, dict):
        return all(is_plain(k) and is_plain(v) for k, v in value.items())
    if isinstance(value, (list, tuple, set)):
        return all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str, bytes, Tensor))


# ---------------------------------------------------------------- which files there are


@dataclass
class Files:
    """What a tag's directory holds of one model-parallel rank, by the numbers in the names."""

    path: Path
    mp_rank: int = 0
    has_model: bool = False
    experts: dict[tuple[int, int], Path] = field(default_factory=dict)  # (MoE module, expert)
    old_experts: dict[int, Path] = field(default_factory=dict)  # expert, of all modules
    optimizer: dict[int, Path] = field(default_factory=dict)  # expert-parallel rank
    zero: dict[int, Path] = field(default_factory=dict)  # data rank

    @property
    def model(self) -> Path:
        return self.path / model_file(self.mp_rank)


def model_file(mp_rank: int) -> str:
    return f"mp_rank_{mp_rank:02d}_model_states.pt"


def expert_file(number: int, expert: int, mp_rank: int) -> str:
    """Of the MoE module with that number, counted from 0."""
    return f"layer_{number}_expert_{expert}_{model_file(mp_rank)}"


def tags_in(directory: Path) -> list[str]:
    return sorted(path.parent.name for path in directory.glob(f"*/{MODEL_FILE}"))


def find_files(directory: str | Path, tag: str | None = None) -> Files:
    """The files of a tag, without one of that in `latest`. CheckpointError for files of a layout that is not read."""
    path = tag_directory(directory, tag)
    ranks = files_by_rank(path)
    for files in ranks.values():
        if files.mp_rank:
            raise CheckpointError(
                f"{files.model}: was saved under model parallelism, and how a module of yours is cut is known to that module alone; save it "
                f"with one model-parallel rank (tools/convert_checkpoint.py --from megatron-deepspeed reads Megatron's GPT models)"
            )
    if 0 not in ranks or not ranks[0].has_model:
        raise CheckpointError(f"{path / MODEL_FILE}: missing; {why_without_model(path)}")
    return ranks[0]


def tag_directory(directory: str | Path, tag: str | None = None) -> Path:
    """DIR and a tag, or that in DIR/latest -> DIR/tag."""
    path = Path(directory) / (_latest(Path(directory)) if tag is None else str(tag))
    if not path.is_dir():
        raise CheckpointError(f"{path}: not there; {_tags_text(Path(directory))}")
    return path


def files_by_rank(path: Path) -> dict[int, Files]:
    """Model-parallel rank -> its files, in the directory of a tag. Files of other names are not looked at."""
    ranks: dict[int, Files] = {}
    for entry in sorted(path.iterdir()):
        for kind, pattern in _PATTERNS.items():
            if match := re.fullmatch(pattern, entry.name):
                *numbers, mp_rank = map(int, match.groups())
                files = ranks.setdefault(mp_rank, Files(path, mp_rank))
                if kind == "model":
                    files.has_model = True
                else:
                    getattr(files, kind)[tuple(numbers) if len(numbers) > 1 else numbers[0]] = entry
    return dict(sorted(ranks.items()))


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


def why_without_model(path: Path) -> str:
    if any(path.glob("iter_*/manifest.json")):
        return "engine.save_checkpoint of this package has written it, and engine.load_checkpoint reads it"
    if any(path.glob("zero_pp_rank_*_model_states.pt")):
        return "the weights were saved in pieces by ZeRO stage 3, which DeepSpeed's MoE has not; join them with its zero_to_fp32.py"
    if any(path.glob("layer_*-model_*_model_states.pt")):
        return "it was saved by DeepSpeed's pipeline engine, whose layers have no names of the module; save it without pipeline"
    return f"there are {', '.join(sorted(p.name for p in path.iterdir())[:5]) or 'no files'}"
