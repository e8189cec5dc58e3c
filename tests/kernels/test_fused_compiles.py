"""The kernels of the fused all-to-all as machine code, without a GPU: stores of 16 bytes, signals that order memory, nothing spilled.

Shapes: 64 experts (and 256) over 8 ranks, 8 per token, rows of 2048 in bf16.
"""

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

import triton.language as tl  # noqa: E402

from megatron_moe.kernels.fused import triton_exchange as kernels  # noqa: E402
from megatron_moe.kernels.fused.exchange import tiles  # noqa: E402
from tests.kernels.test_triton_kernels import ARCHITECTURES, VECTOR_LOAD, VECTOR_STORE, Compiled  # noqa: E402

WORLD, EXPERTS, K, H, BH = 8, 64, 8, 2048, 1024
RELEASE, ACQUIRE, BOTH = (rf"\.{order}\.sys" rf"|\.sys\.{order}\b" for order in ("release", "acquire", "acq_rel"))
POINTERS = ("x_ptrs", "weight_ptrs", "signal_ptrs", "count_ptrs", "row_ptrs", "scalar_ptrs")
NUMBERS = ("me", "spins", "T", "R", "steps", "blocks", "num_rows")
ROWS = ("x", "out", "received", "rows", "staged")
WIDE = ("weights", "scalars", "received_weights", "row_weights", "staged_scalars")


def compiled(kernel, architecture, **constants):
    def type_of(name):
        if name in NUMBERS:
            return "i32"
        if name in POINTERS or name == "ids":
            return "*i64"
        return "*bf16" if name in ROWS else "*fp32" if name in WIDE else "*i32"

    names = [name for name in kernel.arg_names if name not in constants]
    return Compiled(kernel, architecture, {name: type_of(name) for name in names}, constants)


def assert_nothing_is_spilled(made, tmp_path):
    registers, stack, local = made.needs(tmp_path)
    assert (stack, local) == (0, 0) and registers <= 128


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_send_writes_16_bytes_at_a_time_and_signals_after_it(architecture, tmp_path):
    made = compiled(kernels.send_kernel, architecture, H=H, K=K, WORLD=WORLD, BH=BH, HAS_W=True, DT=tl.bfloat16, WDT=tl.float32)
    assert made.count(VECTOR_STORE) == K * H // BH  # 1024 values of 2 bytes, 128 threads: one store each, per choice
    assert made.count(VECTOR_LOAD) == H // BH  # a row is read once
    assert made.count(r"st\.global[.\w]*\.b16") == 0
    assert made.count(RELEASE) == WORLD and made.count(ACQUIRE) == 2 * WORLD and made.count(BOTH) == 1
    assert_nothing_is_spilled(made, tmp_path)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("has_scalars", [pytest.param(False, marks=pytest.mark.matrix), True])
def test_gather_reads_16_bytes_at_a_time_all_choices_at_once(has_scalars, architecture, tmp_path):
    made = compiled(kernels.gather_sum_kernel, architecture, H=H, K=K, BH=BH, HAS_S=has_scalars, DT=tl.bfloat16, WDT=tl.float32)
    assert made.count(VECTOR_LOAD) == K and made.count(VECTOR_STORE) == 1
    assert_nothing_is_spilled(made, tmp_path)


SMALL = [
    ("meet_kernel", {"WORLD": WORLD, "CHANNEL": 2}),
    ("land_kernel", {"H": H, "EL": 8, "ELP2": 8, "BH": BH, "HAS_W": True}),
    ("stage_kernel", {"H": H, "EL": 8, "BH": BH, "HAS_S": True}),
]


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.matrix), 90, pytest.param(100, marks=pytest.mark.matrix)])
@pytest.mark.parametrize(("name", "constants"), SMALL, ids=[name for name, _ in SMALL])
def test_the_others_move_16_bytes_and_spill_nothing(name, constants, architecture, tmp_path):
    made = compiled(getattr(kernels, name), architecture, **constants)
    if "H" in constants:
        assert made.count(VECTOR_LOAD) == made.count(VECTOR_STORE) == H // BH
    else:
        assert made.count(RELEASE) == WORLD and made.count(ACQUIRE) == 2 * WORLD
    assert_nothing_is_spilled(made, tmp_path)


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.matrix), 90, pytest.param(100, marks=pytest.mark.matrix)])
@pytest.mark.parametrize("experts", [64, pytest.param(256, marks=pytest.mark.matrix)])
def test_planning_spills_nothing(experts, architecture, tmp_path):
    sizes = tiles(experts, K)
    here, experts_p2 = experts // WORLD, sizes["EP2"]
    publish = {"WORLD": WORLD, "E": experts, "EL": here, "EP2": experts_p2, "ALIGN": 8, "NB": 4096 // experts_p2}
    for made in (
        compiled(kernels.count_kernel, architecture, E=experts, **sizes),
        compiled(kernels.publish_kernel, architecture, **publish),
        compiled(kernels.place_kernel, architecture, E=experts, EL=here, **sizes),
    ):
        assert_nothing_is_spilled(made, tmp_path)
    assert compiled(kernels.publish_kernel, architecture, **publish).count(RELEASE) == WORLD
