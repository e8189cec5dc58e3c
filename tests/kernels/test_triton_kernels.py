"""Triton's kernels without a GPU: their numbers in Triton's interpreter, and the machine code they become."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

from megatron_moe.kernels import triton_activation, triton_fp8, triton_gemm  # noqa: E402

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
        aligned = [n for n in names if signature[n].startswith("*") or (n in ("width", "K", "N") and n not in constants)]
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


PRODUCT = {"x": BF16, "row": "*i64", "w": BF16, "ends": I32, "y": BF16, "column_tiles": "i32", "K": "i32", "N": "i32"}
OUTER = {"x": BF16, "row": "*i64", "dy": BF16, "ends": I32, "dw": BF16, "column_tiles": "i32", "K": "i32", "N": "i32"}
SHARED = {80: 163, 90: 227, 100: 227}  # KiB that a program may have


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("kind", ["product", "outer"])
def test_gathered_products_use_the_tensor_cores_and_spill_nothing(kind, architecture, tmp_path):
    kernel, types, constants = {
        "product": (triton_gemm.gathered_product, PRODUCT, triton_gemm.FORWARD | {"E": 64, "E_POW2": 64}),
        "outer": (triton_gemm.gathered_outer, OUTER, triton_gemm.OUTER),
    }[kind]
    made = Compiled(kernel, architecture, types, constants, triton_gemm.WARPS, triton_gemm.STAGES)
    core = {80: r"mma\.sync", 90: r"wgmma\.mma_async", 100: r"tcgen05\.mma"}[architecture]
    assert made.count(core) > 0
    assert made.count(r"cp\.async\.cg") > 0  # rows and matrices are on their way while others are multiplied
    assert made.shared <= SHARED[architecture] * 1024
    registers, stack, local = made.needs(tmp_path)
    assert (stack, local) == (0, 0) and registers <= 255


@pytest.mark.parametrize("architecture", [90, 100])  # sm_80 has no e4m3
def test_quantising_rows_reads_16_bytes_at_a_time_and_spills_nothing(architecture, tmp_path):
    types = {"x": BF16, "q": "*fp8e4nv", "scales": F32, "rows": "i32", "width": "i32"}
    constants = {"LARGEST": 448.0, "SMALLEST": 2.0**-100, "BR": 2, "BD": triton_fp8.COLUMNS}
    made = Compiled(triton_fp8.quantise, architecture, types, constants)
    assert made.count(VECTOR_LOAD) >= 4 and made.count(r"cvt\.rn\.satfinite\.e4m3x2\.f32") > 0
    assert made.count(r"st\.global[.\w]*\.v[24]\.b32") > 0
    registers, stack, local = made.needs(tmp_path)
    assert (stack, local) == (0, 0) and registers <= 128
