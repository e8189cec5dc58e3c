"""Any module of a user -> expert parallelism of its MoE layers, ZeRO of everything.

The recipe, and why this order:

    1. equal weights on all ranks      rank 0 speaks: nobody has to seed anything
    2. experts to their owners         edits parameters by name, before anything wraps them
    3. FSDP2 units, inside out         experts, router (in 16 bits), blocks, the rest: replaces the parameters
    4. marks of the user               attributes that he has set on parameters move to their successors

A block is an element of a ModuleList that has a forward and children: a layer of a transformer. Models without one are a single unit,
which is right, and gathers everything at once under ZeRO 3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DataParallel, DistributedDataParallel

from megatron_moe.config.model import divisors
from megatron_moe.deepspeed.moe.layer import MoE
from megatron_moe.model.init import store_in_half
from megatron_moe.moe.gate import Gate
from megatron_moe.mpu.mesh import ParallelMesh
from megatron_moe.parallel.zero import shard_moe, shard_unit, unit_options
from megatron_moe.utils.compat import reduce_unused_gradients
from megatron_moe.utils.logging import logger


@dataclass(frozen=True)
class Storage:
    """What a model is computed and stored in, and where its shards live."""

    half: torch.dtype | None = None  # computed in; None: as it is
    is_stored_in_half: bool = False
    is_offloaded: bool = False

    @property
    def reduced_in(self) -> torch.dtype:
        return torch.float16 if self.is_stored_in_half else torch.float32


def moe_modules(module: nn.Module) -> dict[str, MoE]:
    """By name, in order."""
    return {name: m for name, m in module.named_modules() if isinstance(m, MoE)}


def expert_degrees(module: nn.Module, section: dict[str, Any], ranks: int) -> dict[str, int]:
    """MoE layer -> ranks that share its experts out: its own `ep_size`, else that of the JSON's moe section. ValueError for one that
    does not divide, or that the section contradicts."""
    asked, degrees = section.get("moe_expert_parallel_size"), {}
    for name, moe in moe_modules(module).items():
        degree = asked if asked is not None and moe.ep_size == 1 else moe.ep_size
        if asked is not None and degree != asked:
            raise ValueError(
                f"moe.expert_parallel_size ({asked}) contradicts ep_size ({moe.ep_size}) of the MoE layer {name}; make them equal or drop one"
            )
        if moe.num_experts % degree:
            raise ValueError(
                f"the {moe.num_experts} experts of the MoE layer {name} cannot be shared out over {degree} ranks (ep_size); "
                f"use one of {', '.join(map(str, divisors(moe.num_experts)))}, or other experts"
            )
        if ranks % degree:
            raise ValueError(
                f"the expert-parallel degree ({degree}) of the MoE layer {name} must divide the number of ranks ({ranks}); "
                f"use one of {', '.join(map(str, divisors(ranks)))}, or start other ranks"
            )
        degrees[name] = degree
    return degrees


def check_layers(module: nn.Module, section: dict[str, Any], spelled: dict[str, str]) -> None:
    """ValueError where the JSON's moe section says something else of the layers than the code that made them. `spelled`: field ->
    the key that said it."""
    layers = moe_modules(module)
    if section and not layers:
        raise ValueError(
            f"the config speaks of experts ({', '.join(spelled.values())}) and the model has no MoE layer; leave the moe section out"
        )
    counts = section.get("num_experts", ())
    if len(counts) > 1 and len(counts) != len(layers):
        raise ValueError(
            f"moe.num_experts has {len(counts)} numbers and the model {len(layers)} MoE layers; give one number, or one for each"
        )
    for i, (name, moe) in enumerate(layers.items()):
        made = {"num_experts": moe.num_experts, "mlp_type": "residual" if moe.use_residual else "standard"}
        for field, value in section.items():
            if field == "moe_expert_parallel_size":
                continue  # a layer without a degree of its own takes it
            wanted = counts[i if len(counts) > 1 else 0] if field == "num_experts" else value
            has = made[field] if field in made else getattr(moe.core.config, field)
            if has != wanted:
                raise ValueError(
                    f"{spelled[field]} ({wanted}) contradicts the MoE layer {name}, which was made with {has}; make them equal or drop one"
                )


# ---------------------------------------------------------------- the recipe


def check_module(module: nn.Module) -> None:
    """ValueError for what cannot be made parallel."""
    kind = type(module).__name__
    if isinstance(module, DistributedDataParallel | DataParallel):
        raise ValueError(f"the model is wrapped in {kind}, which would sum gradients a second time; give its .module")
    if any(isinstance(m, FSDPModule) for m in module.modules()):
        raise ValueError("the model has FSDP units in it already; give it as it was before fully_shard, the engine wraps it")
    if empty := [name for name, p in module.named_parameters() if p.is_meta]:
        raise ValueError(
            f"parameters without memory (device meta): {', '.join(empty[:5])}; build the model on a device, its weights are its start"
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise ValueError(f"the model {kind} has no parameter that requires a gradient; check requires_grad")


def place(module: nn.Module, device: torch.device, storage: Storage) -> None:
    """On the device, and in the type that it is stored in. Parameters stay the same objects: optimizers know them."""
    module.to(device)
    if storage.half is None:
        dtypes = {p.dtype for p in module.parameters() if p.is_floating_point()}
        if len(dtypes) > 1 and (dist.get_world_size() > 1 or storage.is_offloaded):
            raise ValueError(
                f"the model's parameters are of several types ({', '.join(sorted(map(str, dtypes)))}), and a unit is gathered as one tensor; "
                f"call model.float() and switch bf16 or fp16 on in the config to compute in 16 bits"
            )
        return
    if storage.is_stored_in_half:
        store_in_half(module)
    else:
        module.float()
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if buffer.is_floating_point() and not isinstance(owner, Gate):
                owner._buffers[name] = buffer.to(storage.half)  # FSDP casts parameters alone


@torch.no_grad()
def agree_on_weights(module: nn.Module) -> None:
    """Those of rank 0 on all ranks, buffers too. Collective."""
    if dist.get_world_size() > 1:
        for tensor in [*module.parameters(), *module.buffers()]:
            dist.broadcast(tensor.data, 0)


def parallelise(module: nn.Module, mesh: ParallelMesh, degrees: dict[str, int], storage: Storage) -> bool:
    """Apply it in place. False where one rank has nothing to split, to sum or to cast, and the module stays as it is."""
    if dist.get_world_size() == 1 and storage.half is None and not storage.is_offloaded:
        return False
    agree_on_weights(module)
    before = dict(module.named_parameters())
    kind = unit_options(mesh.zero_stage, storage.half, storage.is_offloaded, storage.reduced_in)
    blocks = list(blocks_of(module))
    for name, moe in moe_modules(module).items():
        moe.parallelise_(mesh, degrees[name])
        shard_moe(moe.core, mesh, degrees[name], storage.half, kind)
    for _, block in blocks:
        shard_unit(block, mesh.data, **kind)
    shard_unit(module, mesh.data, **kind | {"reshard_after_forward": False})
    if not reduce_unused_gradients(module) and dist.get_world_size() > 1:
        logger.warning("this torch cannot sum gradients of parameters that some ranks alone have used: all ranks must use the same ones")
    for name, p in module.named_parameters():
        _move_marks(before[name], p)
    for moe in moe_modules(module).values():
        moe.tag_experts()  # the group's name has the degree, which the JSON may have said
    names = f" (blocks: {blocks[0][0]} to {blocks[-1][0]})" if blocks else ""
    logger.info("FSDP units: %d of experts, %d blocks%s, and the rest", len(degrees), len(blocks), names)
    return True


def blocks_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules that are worth a unit: called as a whole, and without parameters that the rest of the model uses too."""
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    inside: list[str] = [f"{name}." if name else "" for name in moe_modules(module)]  # a MoE layer is cut by itself
    for name, parent in module.named_modules():
        if not isinstance(parent, nn.ModuleList) or f"{name}.".startswith(tuple(inside)):
            continue
        for own, child in parent.named_children():
            prefix = f"{name}.{own}." if name else f"{own}."
            if f"{prefix}".startswith(tuple(inside)) or not _is_called(child) or not any(True for _ in child.parameters()):
                continue
            if all(n.startswith(prefix) for p in child.parameters() for n in names[id(p)]):
                inside.append(prefix)  # blocks within a block belong to it
                yield prefix[:-1], child


def _is_called(module: nn.Module) -> bool:
    """Whether it has a forward of its own, which its owner calls; a leaf's weights are often read directly instead."""
    return type(module).forward is not nn.Module.forward and any(True for _ in module.children())


def _move_marks(old: nn.Parameter, new: nn.Parameter) -> None:
    """`p.allreduce = False` of experts, `p.no_decay = True` of anybody."""
    if old is not new:
        for name, value in vars(old).items():
            if name not in vars(new) and not name.startswith("_"):
                setattr(new, name, value)


# ---------------------------------------------------------------- parameters by name


def names_of(module: nn.Module) -> dict[int, str]:
    """id of a parameter -> its name, for as long as the module keeps these objects."""
    return {id(p): name for name, p in module.named_parameters()}


def local(t: Tensor) -> Tensor:
    """What of a sharded tensor is here."""
    return t.to_local() if hasattr(t, "to_local") else t
