"""Python's plain data as JSON and back, without losing what JSON does not know: tuples, keys that are no text, small tensors.

    {"a": (1, 2)}  ->  {"a": {"~": "tuple", "v": [1, 2]}}  ->  {"a": (1, 2)}

Of the objects in files that deepspeed_files.py has opened, a Namespace and an array of numpy's numbers are known by what is inside of them;
any other one is left out, and named.
"""

from __future__ import annotations

import base64
import re
from argparse import Namespace  # as data in the files of others; nothing is parsed here
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from megatron_moe.checkpoint.deepspeed_files import Inert

NAMESPACES = {"argparse.Namespace": "namespace", "types.SimpleNamespace": "simple"}
MARK = "~"
LARGEST = 1 << 16  # bytes of a tensor: states of generators, no weights


class _LeftOutError(Exception):
    pass


def encode(value: Any, where: str, left: list[str]) -> Any:
    """`left`: places of what is no plain data; the nearest entry of a dict around it is left out."""
    try:
        return _encode(value, where, left)
    except _LeftOutError:
        left.append(where)
        return None


def _encode(value: Any, where: str, left: list[str]) -> Any:
    import torch

    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if value == value and abs(value) != float("inf") else _marked("float", repr(value))
    if isinstance(value, dict):
        return _encode_dict(value, where, left)
    if isinstance(value, list):
        return [_encode(item, where, left) for item in value]
    if isinstance(value, (tuple, set)):
        return _marked("tuple" if isinstance(value, tuple) else "set", [_encode(item, where, left) for item in value])
    if isinstance(value, bytes):
        return _marked("bytes", base64.b64encode(value).decode())
    if isinstance(value, torch.dtype):
        return _marked("dtype", str(value).removeprefix("torch."))
    if isinstance(value, torch.Tensor) and value.nbytes <= LARGEST:
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return _marked("tensor", [str(value.dtype).removeprefix("torch."), list(value.shape), base64.b64encode(data).decode()])
    if isinstance(value, Inert):
        return _encode_inert(value, where, left)
    raise _LeftOutError


def _encode_inert(value: Inert, where: str, left: list[str]) -> Any:
    if value.path in NAMESPACES and isinstance(value.state, dict):
        return _marked(NAMESPACES[value.path], _encode_dict(value.state, where, left))
    if value.path.endswith("multiarray._reconstruct") and isinstance(value.state, tuple) and len(value.state) == 5:
        _, shape, dtype, _, data = value.state
        kind = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
        if isinstance(kind, str) and re.fullmatch(r"[iuf][1248]", kind) and isinstance(data, bytes) and len(data) <= LARGEST:
            return _marked("array", [f"<{kind}", list(shape), base64.b64encode(data).decode()])
    raise _LeftOutError


def _encode_dict(values: Mapping[Any, Any], where: str, left: list[str]) -> Any:
    pairs = []
    for key, value in values.items():
        try:
            pairs.append([_encode(key, where, left), _encode(value, f"{where} {key}", left)])
        except _LeftOutError:
            left.append(f"{where} {key}")
    if all(isinstance(key, str) for key, _ in pairs) and MARK not in values:
        return dict(pairs)
    return _marked("dict", pairs)


def _marked(kind: str, value: Any) -> dict[str, Any]:
    return {MARK: kind, "v": value}


def decode(value: Any) -> Any:
    """The inverse. A tensor's bytes are copied; a Namespace is one again."""
    import torch

    if isinstance(value, list):
        return [decode(item) for item in value]
    if not isinstance(value, dict):
        return value
    if MARK not in value:
        return {key: decode(item) for key, item in value.items()}
    kind, inner = value[MARK], value["v"]
    if kind == "tensor":
        dtype, shape, data = inner
        raw = torch.frombuffer(bytearray(base64.b64decode(data)) or bytearray(1), dtype=torch.uint8)
        return raw[: len(base64.b64decode(data))].view(getattr(torch, dtype)).reshape(shape).clone()
    return {
        "float": float, "bytes": base64.b64decode, "dtype": lambda name: getattr(torch, name), "tuple": lambda v: tuple(map(decode, v)),
        "set": lambda v: set(map(decode, v)), "dict": lambda v: {decode(a): decode(b) for a, b in v},
        "namespace": lambda v: Namespace(**decode(v)), "simple": lambda v: SimpleNamespace(**decode(v)), "array": _array,
    }[kind](inner)  # fmt: skip


def _array(inner: list[Any]) -> Any:
    import numpy as np

    kind, shape, data = inner
    return np.frombuffer(base64.b64decode(data), dtype=kind).reshape(shape).copy()
