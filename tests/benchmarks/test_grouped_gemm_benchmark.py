"""What `python -m benchmarks grouped_gemm` compares; its times need a GPU."""

import pytest
import torch

from benchmarks import grouped_gemm
from benchmarks.harness import Options
from megatron_moe.kernels import reference


def test_without_a_gpu_it_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    report = grouped_gemm.run(Options(quick=True, out=str(tmp_path)))
    assert report.skipped == {"everything": grouped_gemm.NO_GPU}
    assert not report.tables


@pytest.mark.parametrize("align", grouped_gemm.ALIGNMENTS)
@pytest.mark.parametrize("shape", grouped_gemm.SHAPES)
def test_groups_are_uneven_multiples_of_the_alignment_and_take_all_rows(shape, align):
    T, _, _, E, K = shape
    ends = grouped_gemm.offsets_of(T * K, E, align).tolist()
    sizes = [b - a for a, b in zip([0, *ends], ends)]
    assert all(size % align == 0 for size in sizes)
    assert ends[-1] == T * K
    assert min(sizes) < 0.8 * T * K / E < T * K / E < max(sizes)


def test_every_system_makes_the_product_that_it_is_named_after():
    made = grouped_gemm.systems_of((64, 32, 48, 4, 2), torch.device("cpu"), has_fp8=False)
    offsets = grouped_gemm.offsets_of(128, 4, 1)
    cells = dict(zip(made["grouped_mm, align 1"].__code__.co_freevars, [c.cell_contents for c in made["grouped_mm, align 1"].__closure__]))
    want = reference.grouped_mm(cells["x_RD"].float(), cells["w_EDF"].float(), offsets)
    for name in ("grouped_mm, align 1", "copy and grouped_mm"):
        torch.testing.assert_close(made[name]().float(), want, rtol=2e-2, atol=5e-2)
    shapes = {name: tuple(work().shape) for name, work in made.items()}
    assert shapes["one dense product"] == (128, 48)
    for align in grouped_gemm.ALIGNMENTS:
        assert shapes[f"gradient of rows, align {align}"] == (128, 32)
        assert shapes[f"gradient of matrices, align {align}"] == (4, 32, 48)
