"""Triton's kernels without a GPU: their numbers in Triton's interpreter, and the machine code they become."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe.kernels import triton_activation  # noqa: E402

HERE = Path(__file__).resolve().parent
ARCHITECTURES = [80, 90, 100]
BF16, F32, I32 = "*bf16", "*fp32", "*i32"


@pytest.mark.parametrize("file", sorted(HERE.glob("interpreted_*.py")), ids=lambda f: f.stem)
def test_numbers_in_the_interpreter(file):
    """In a process of its own: whether triton interprets is decided when it is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", str(file)]
    done = subprocess.run(command, cwd=HERE.parents[1], env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"\d+ passed", done.stdout)
    assert "skipped" not in done.stdout


# ---------------------------------------------------------------- compiled


class Compiled:
    """A kernel for one architecture: its PTX, and what its program needs."""

    def __init__(self, kernel, architecture, types, constants, num_warps=4, num_stages=3):
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource

        names = kernel.arg_names
        signature = {n: "constexpr" if n in constants else types[n] for n in names}
        aligned = [n for n in names if signature[n].startswith("*") or n in ("width", "K", "N")]
        attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
        made = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
            target=GPUTarget("cuda", architecture, 32), options={"num_warps": num_warps, "num_stages": num_stages},
        )  # fmt: skip
        self.ptx, self.cubin, self.shared = made.asm["ptx"], made.asm["cubin"], made.metadata.shared

    def count(self, pattern):
        return len(re.findall(pattern, self.ptx))

    def needs(self, tmp_path):
        """(registers, stack, local) by the tool that comes with triton."""
        file = tmp_path / "kernel.cubin"
        file.write_bytes(self.cubin)
        tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
        said = subprocess.run([tool, "--dump-resource-usage", file], capture_output=True, text=True, check=True).stdout
        return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", said).groups()))


ACTIVATION = {"E": 8, "E_POW2": 8, "BR": triton_activation.ROWS, "BF": triton_activation.COLUMNS}
ROWS = {"h": BF16, "gate": BF16, "weights": F32, "ends": I32, "b1": BF16, "b_gate": BF16, "rows": "i32", "width": "i32"}
FORWARD, BACKWARD = ROWS | {"out": BF16}, ROWS | {"dout": BF16, "dh": BF16, "dgate": BF16, "dweights": F32}
VECTOR_LOAD, VECTOR_STORE = r"ld\.global[.\w]*\.v4\.b32", r"st\.global[.\w]*\.v4\.b32"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("name", "bias"), [("swiglu", False), ("gelu", True), pytest.param("swiglu", True, marks=pytest.mark.matrix)])
def test_the_activation_moves_16_bytes_at_a_time_and_spills_nothing(name, bias, architecture, tmp_path):
    constants = ACTIVATION | {"NAME": name, "HAS_BIAS": bias}
    tensors = 2 if name == "swiglu" else 1
    forward = Compiled(triton_activation.activation_forward, architecture, FORWARD, constants)
    assert forward.count(VECTOR_LOAD) >= 2 * tensors and forward.count(VECTOR_STORE) >= 2
    assert forward.count(r"st\.global") == forward.count(VECTOR_STORE)
    backward = Compiled(triton_activation.activation_backward, architecture, BACKWARD, constants)
    assert backward.count(VECTOR_LOAD) >= 2 * (1 + tensors) and backward.count(VECTOR_STORE) >= 2 * tensors
    for made in (forward, backward):
        registers, stack, local = made.needs(tmp_path)
        assert (stack, local) == (0, 0) and registers <= 128


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sums_for_biases_spill_nothing(architecture, tmp_path):
    types = {"x": BF16, "ends": I32, "out": F32, "width": "i32"}
    made = Compiled(triton_activation.sum_of_experts_rows, architecture, types, {"BR": 32, "BF": 128})
    registers, stack, local = made.needs(tmp_path)
    assert (stack, local) == (0, 0) and registers <= 128
