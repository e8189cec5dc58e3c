"""Python's plain data as JSON and back, without losing what JSON does not know: tuples, keys that are no text, small tensors.

    {"a": (1, 2)}  ->  {"a": {"~": "tuple", "v": [1, 2]}}  ->  {"a": (1, 2)}

A pickled argparse.Namespace is known by its class alone; any other object is left out, and named.
"""

from __future__ import annotations

import base64
from argparse import Namespace  # as data in the files of others; nothing is parsed here
from collections.abc import Mapping
from typing import Any

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
    if getattr(value, "path", None) == "argparse.Namespace" and isinstance(value.state, dict):
        return _marked("namespace", _encode_dict(value.state, f"{where} args", left))
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
        "namespace": lambda v: Namespace(**decode(v)),
    }[kind](inner)  # fmt: skip
