import pytest
import torch

from quamba.ops import linear
from tests.cuda.compare import FLOATS, check, randint8, randn, scales, sliced, strided

# One row changes one thing of the base case: M, N, K.
SHAPES = [
    (64, 256, 512),
    *[(m, 256, 512) for m in (1, 2, 3, 4, 7, 8, 9, 16, 17, 32, 33, 65, 129, 300)],
    *[(64, n, 512) for n in (1, 15, 16, 24, 192, 1000, 4104)],
    *[(64, 256, k) for k in (1, 5, 16, 48, 160, 1000)],
    (1, 5120, 160),
    (3, 192, 5120),
    (5, 4100, 2561),
    (1, 4101, 7),
    (200, 517, 333),
    (2048, 1536, 768),
    (1, 2560, 5120),
    (16, 10240, 2560),
    (2048, 2560, 640),
    (1900, 10240, 256),
    (1024, 2560, 1024),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column", *FLOATS])
def test_shapes(shape: tuple[int, int, int], out) -> None:
    m, n, k = shape
    quantized = isinstance(out, str)
    # Scales that give results in and a little out of the int8 range.
    out_scale = (scales(n, mean=0.5) if "column" in out else scales(mean=0.5)) if quantized else None
    dtype = torch.int8 if quantized else out
    size = 1.0 / (k**0.5 * 74 * 74) * 30
    args = (randint8(m, k), torch.tensor(size, device="cuda"), randint8(n, k), scales(n, mean=1.0))
    check(linear, *args, None, None, out_scale, dtype, flips=1e-4)


# Each cut of the ring kernel: 16, 32 and 64 rows of x a block; 32, 80, 128 and, for many rows, 96 columns; clusters of
# 1, 2, 4 and 8 blocks.
RING_SHAPES = [
    *[(m, 256, 512) for m in (1, 15, 16, 17, 32, 33, 64, 65, 250)],
    *[(64, n, 512) for n in (1, 15, 79, 192, 2570)],
    *[(64, 256, k) for k in (16, 48, 160, 1040)],
    (60, 192, 5120),
    (64, 2560, 5120),
    (33, 5120, 160),
    (64, 10240, 2560),
    (12, 10240, 2560),
    (20, 50280, 256),
    (400, 192, 1040),
    (700, 90, 1536),
    (1000, 97, 160),
    (2048, 192, 5120),
]


@pytest.mark.parametrize("shape", RING_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column", *FLOATS])
def test_ring(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "ring")
    test_shapes(shape, out)


@pytest.mark.parametrize("m", [12, 30, 150])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("bias", [None, torch.float16])
@pytest.mark.parametrize("residual", [None, *FLOATS])
def test_ring_epilogue(monkeypatch: pytest.MonkeyPatch, m: int, out: torch.dtype, bias, residual) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "ring")
    test_epilogue(m, out, bias, residual)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_ring_strides(monkeypatch: pytest.MonkeyPatch, view) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "ring")
    test_strides(15, view)


@pytest.mark.parametrize("shape", [*SHAPES, (64, 10240, 2560), (70, 81, 4112)])
@pytest.mark.parametrize("out", ["int8", "int8 per column"])
def test_64x80(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out: str) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "64x80")
    test_shapes(shape, out)


# Shapes that are one pass of the widest tiles over the device, and some that fill neither their rows nor columns.
WIDE_SHAPES = [
    *[(m, 320, 512) for m in (1, 16, 127, 129, 255, 257, 600)],
    *[(300, n, 160) for n in (8, 152, 161, 168, 330, 1000)],
    *[(260, 336, k) for k in (16, 144, 1000, 4112)],
    (2048, 2560, 5120),
    (2048, 3072, 768),
    (1024, 2560, 1024),
    (512, 10240, 256),
    (2048, 5120, 160),
]


@pytest.mark.parametrize("kernel", ["128x160"])
@pytest.mark.parametrize("shape", WIDE_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column", torch.float16, torch.bfloat16])
def test_wide(monkeypatch: pytest.MonkeyPatch, kernel: str, shape: tuple[int, int, int], out) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    test_shapes(shape, out)


@pytest.mark.parametrize("shape", WIDE_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column"])
def test_256x192(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out: str) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "256x192")
    test_shapes(shape, out)


@pytest.mark.parametrize("kernel", ["128x160", "256x192", "128x80", "128x96"])
@pytest.mark.parametrize("m", [40, 300])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("bias", [None, torch.float16])
@pytest.mark.parametrize("residual", [None, *FLOATS])
def test_wide_epilogue(monkeypatch: pytest.MonkeyPatch, kernel: str, m: int, out: torch.dtype, bias, residual) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    test_epilogue(m, out, bias, residual)


RESIDUAL_SHAPES = [
    *[(m, 320, 512) for m in (1, 127, 129, 255, 600)],
    *[(300, n, 160) for n in (8, 76, 84, 92, 100, 336, 1000)],
    *[(260, 336, k) for k in (16, 144, 1000, 4112)],
    (512, 2560, 5120),
    (2048, 2560, 5120),
    (2048, 768, 1536),
]


@pytest.mark.parametrize("kernel", ["128x256", "128x192", "128x160", "128x80", "128x96"])
@pytest.mark.parametrize("shape", RESIDUAL_SHAPES)
def test_residual_stream(monkeypatch: pytest.MonkeyPatch, kernel: str, shape: tuple[int, int, int]) -> None:
    """A float32 residual and result, whose tiles are all there is for them."""
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    m, n, k = shape
    weight_scale = scales(n, mean=1e-2)
    residual = randn(m, n, scale=30.0)
    check(linear, randint8(m, k), scales(), randint8(n, k), weight_scale, None, residual, None, torch.float32)


KERNELS = ["ring", "short", "strips", "pairs", "slices", "128x256", "128x192", "64x64", "64x80", "128x160", "256x192"]


@pytest.mark.parametrize("shape", [(300, 2560, 160), (600, 3072, 768), (513, 192, 5120), (40, 1536, 48)])
@pytest.mark.parametrize("out", [torch.int8, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_kernels_agree(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out, per_token: bool) -> None:
    """Whatever kernel computes a product, the result is the same to the bit."""
    m, n, k = shape
    x_scale = scales(m, 1, mean=0.4 / k**0.5) if per_token else scales(mean=0.4 / k**0.5)
    args = (randint8(m, k), x_scale, randint8(n, k), scales(n), None)
    last = (None, scales(n, mean=0.8)) if out == torch.int8 else (randn(m, n, dtype=torch.float16), None)
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "128x128")
    expected = linear(*args, *last, out)
    for kernel in KERNELS:
        monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
        assert torch.equal(linear(*args, *last, out), expected), kernel


# Of the kernels by pairs of thread blocks, each tile that the choice has, odd numbers of tiles, rows and columns that
# fill none.
PAIRS_SHAPES = [
    *[(m, 320, 512) for m in (1, 127, 129, 255, 257, 600)],
    *[(300, n, 160) for n in (32, 96, 224, 352, 1024)],
    *[(260, 352, k) for k in (144, 272, 1040, 4112)],
    (512, 10240, 2560),
    (2048, 3072, 768),
    (512, 3072, 768),
    (512, 8192, 2048),
    (512, 6144, 1536),
]


@pytest.mark.parametrize("shape", PAIRS_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column"])
def test_pairs(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out: str) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "pairs")
    test_shapes(shape, out)


@pytest.mark.parametrize("kernel", ["pairs", "halves", "quads"])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize(
    "shape",
    [
        *[(m, 320, 512) for m in (1, 127, 129, 600)],
        *[(300, n, 160) for n in (16, 80, 240, 1008)],
        *[(260, 336, k) for k in (144, 272, 1040, 4112)],
        (512, 2560, 5120),
        (512, 2048, 4096),
        (512, 1536, 3072),
        (512, 1024, 2048),
        (2048, 768, 1536),
    ],
)
def test_pairs_residual(monkeypatch, kernel: str, shape: tuple[int, int, int], per_token: bool) -> None:
    m, n, k = shape
    x_scale = scales(m, 1) if per_token else scales()
    residual = sliced(randn(m, n, scale=30.0))
    args = (randint8(m, k), x_scale, randint8(n, k), scales(n, mean=1e-2), None, residual, None, torch.float32)
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "128x128")
    expected = linear(*args)
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    assert torch.equal(linear(*args), expected)
    check(linear, *args)


# Of the kernel by slices of K: each number of rows that it has code for, filled and not; columns that fill neither a
# group of warps nor eight, and more than a block's; slices that are not alike; the models' W_x.
SLICES_SHAPES = [
    *[(m, 192, 1040) for m in (1, 7, 9, 63, 65, 200, 513, 4100)],
    *[(130, n, 1040) for n in (4, 60, 80, 100, 128, 196, 256, 288, 500)],
    *[(130, 96, k) for k in (144, 272, 400, 1536, 4112)],
    (2048, 192, 5120),
    (512, 192, 5120),
    (2048, 80, 1536),
    (300, 288, 8192),
]


@pytest.mark.parametrize("shape", SLICES_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column", *FLOATS])
def test_slices(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "slices")
    test_shapes(shape, out)


@pytest.mark.parametrize("slices", [2, 4])
@pytest.mark.parametrize("rows", [8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96])
@pytest.mark.parametrize("out", [torch.int8, torch.float16])
@pytest.mark.parametrize("per_token", [False, True])
def test_every_cut(monkeypatch, slices: int, rows: int, out: torch.dtype, per_token: bool) -> None:
    """To the bit what another kernel gives."""
    m, n, k = 300, 176, 1552
    x_scale = scales(m, 1, mean=0.4 / k**0.5) if per_token else scales(mean=0.4 / k**0.5)
    args = (sliced(randint8(m, k)), x_scale, sliced(randint8(n, k)), scales(n), None, None)
    out_scale = scales(n, mean=0.8) if out == torch.int8 else None
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "128x128")
    expected = linear(*args, out_scale, out)
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "slices")
    monkeypatch.setenv("QUAMBA_LINEAR_SLICES", f"{slices}x{rows}")
    assert torch.equal(linear(*args, out_scale, out), expected)


@pytest.mark.parametrize("value", ["", "4", "3x64", "4x20", "8x32", "4x104", "4x72x1"])
def test_cut_that_there_is_not(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "slices")
    monkeypatch.setenv("QUAMBA_LINEAR_SLICES", value)
    with pytest.raises(RuntimeError, match="QUAMBA_LINEAR_SLICES"):
        linear(randint8(40, 1024), scales(), randint8(64, 1024), scales(), None, None, None, torch.float16)


@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("per_token", [False, True])
def test_slices_extremes(monkeypatch: pytest.MonkeyPatch, size: float, per_token: bool) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "slices")
    x = torch.full((90, 5120), -128, dtype=torch.int8, device="cuda")
    x[7] = 0
    x_scale = torch.full((90, 1) if per_token else (), size, device="cuda")
    one = torch.tensor(1.0, device="cuda")
    for value in (-128, 127, 1, -1):
        weight = torch.full((192, 5120), value, dtype=torch.int8, device="cuda")
        check(linear, x, x_scale, weight, one, None, None, one, torch.int8)
        check(linear, x, x_scale, weight, one, None, None, None, torch.float32)


@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_slices_strides(monkeypatch: pytest.MonkeyPatch, view) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "slices")
    args = (scales(), sliced(randint8(64, 96)), scales(64))
    check(linear, view(randint8(4, 70, 96)), *args, None, None, None, torch.bfloat16)


# Of the kernel for short rows by strips: each length of K that has code of its own, more rows and strips than a block
# has, parts of either; the models' W_dt.
STRIPS_SHAPES = [
    *[(m, 256, 160) for m in (1, 15, 33, 63, 64, 65, 127, 129, 257, 4100)],
    *[(100, n, 160) for n in (64, 128, 320, 1088)],
    *[(200, 320, k) for k in (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 256)],
    (512, 5120, 160),
    (2048, 1536, 48),
    (2048, 5120, 160),
    (2048, 8192, 256),
]


@pytest.mark.parametrize("shape", STRIPS_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column"])
def test_strips(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out: str) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "strips")
    test_shapes(shape, out)


# Of the kernel for short rows: each length of K that has code of its own; rows of x and columns that fill no block;
# more rows than the device takes at a time; the models' W_dt.
SHORT_SHAPES = [
    *[(m, 256, 160) for m in (1, 15, 16, 17, 31, 33, 250, 4100)],
    *[(100, n, 160) for n in (8, 24, 248, 264, 1000)],
    *[(100, 264, k) for k in (16, 32, 48, 64, 80, 96, 112, 128, 144, 160, 176, 256)],
    (2048, 1536, 48),
    (2048, 5120, 160),
    (1024, 8192, 256),
]


@pytest.mark.parametrize("shape", SHORT_SHAPES)
@pytest.mark.parametrize("out", ["int8", "int8 per column"])
def test_short(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], out: str) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "short")
    test_shapes(shape, out)


@pytest.mark.parametrize("kernel", ["short", "strips"])
@pytest.mark.parametrize("m", [70, 300])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("view", [None, sliced, strided, lambda x: x.transpose(0, 1)])
def test_short_views_and_scales(monkeypatch, kernel: str, m: int, per_token: bool, per_channel: bool, view) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    n = 272 if kernel == "short" else 320
    x = randint8(4, m // 2, 48)
    x = x if view is None else view(x)
    x_scale = scales(*x.shape[:-1], 1, mean=1e-3) if per_token else scales(mean=1e-3)
    weight_scale, weight = scales(n, mean=0.1) if per_channel else scales(mean=0.1), sliced(randint8(n, 48))
    check(linear, x, x_scale, weight, weight_scale, None, None, scales(n, mean=0.2), torch.int8, flips=1e-4)


@pytest.mark.parametrize("kernel", ["short", "strips"])
@pytest.mark.parametrize("size", [1.0, 1e-6, 1e6, 1e30])
@pytest.mark.parametrize("per_token", [False, True])
def test_short_extremes(monkeypatch: pytest.MonkeyPatch, kernel: str, size: float, per_token: bool) -> None:
    """The largest sums there are, far beyond the range of the result on either side, and sums of zero."""
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    n = 264 if kernel == "short" else 320
    x = torch.full((90, 256), -128, dtype=torch.int8, device="cuda")
    x[7] = 0
    x_scale = torch.full((90, 1) if per_token else (), size, device="cuda")
    one = torch.tensor(1.0, device="cuda")
    for value in (-128, 127, 1, -1):
        weight = torch.full((n, 256), value, dtype=torch.int8, device="cuda")
        check(linear, x, x_scale, weight, one, None, None, one, torch.int8)


@pytest.mark.parametrize("m", [1, 3, 8, 40, 200])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("bias", [None, *FLOATS])
@pytest.mark.parametrize("residual", [None, *FLOATS])
def test_epilogue(m: int, out: torch.dtype, bias, residual) -> None:
    n, k = 320, 256
    check(
        linear,
        randint8(m, k),
        scales(m, 1, mean=1e-3),
        randint8(n, k),
        scales(n, mean=1e-1),
        None if bias is None else randn(n, dtype=bias, scale=30.0),
        None if residual is None else randn(m, n, dtype=residual, scale=30.0),
        scales(n, mean=1.0) if out == torch.int8 else None,
        out,
        flips=1e-4,
    )


# The kernels of few rows. Of "dot": weights of few rows, that several warps share, and of more; one to three rounds
# of a row, whole ones and parts.
FEW_SHAPES = [
    *[(1, n, k) for n in (1, 263, 2111) for k in (16, 48, 1024, 1040, 1536, 5120)],
    *[(1, n, k) for n in (2113, 4097) for k in (160, 768, 1200, 2560, 2576)],
    (1, 50280, 768),
    (8, 263, 1040),
]


@pytest.mark.parametrize("kernel", ["dot", "rows4", "rows8", "rows16"])
@pytest.mark.parametrize("shape", FEW_SHAPES)
@pytest.mark.parametrize("out", ["int8 per column", torch.float16])
def test_few_rows(monkeypatch: pytest.MonkeyPatch, kernel: str, shape: tuple[int, int, int], out) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    test_shapes(shape, out)


@pytest.mark.parametrize("kernel", ["dot", "rows4", "rows8", "rows16"])
@pytest.mark.parametrize("out", [torch.int8, *FLOATS])
@pytest.mark.parametrize("bias", [None, *FLOATS])
@pytest.mark.parametrize("residual", [None, *FLOATS])
def test_few_rows_epilogue(monkeypatch: pytest.MonkeyPatch, kernel: str, out: torch.dtype, bias, residual) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    test_epilogue(1, out, bias, residual)


@pytest.mark.parametrize("m", [2, 60])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_scale_shapes(m: int, per_token: bool, per_channel: bool) -> None:
    x_scale = scales(2, m // 2, 1) if per_token else scales()
    weight_scale = scales(48) if per_channel else scales()
    check(linear, randint8(2, m // 2, 64), x_scale, randint8(48, 64), weight_scale, None, None, None, torch.float32)


@pytest.mark.parametrize("m", [3, 70])
@pytest.mark.parametrize("view", [strided, sliced, lambda x: x.transpose(0, 1)])
def test_strides(m: int, view) -> None:
    args = (scales(), sliced(randint8(64, 96)), scales(64))
    check(linear, view(randint8(4, m, 96)), *args, None, None, None, torch.bfloat16)
    residual = view(randn(4, m, 64, dtype=torch.float16))
    x = randint8(*residual.shape[:-1], 96)
    check(linear, x, *args, None, residual, None, torch.float16)


@pytest.mark.parametrize("m", [1, 33])
def test_extremes(m: int) -> None:
    x = torch.full((m, 4096), -128, dtype=torch.int8, device="cuda")
    weight = torch.full((32, 4096), -128, dtype=torch.int8, device="cuda")
    one = torch.tensor(1.0, device="cuda")
    check(linear, x, one, weight, one, None, None, None, torch.float32)
    check(linear, x, one, weight, one, None, None, one, torch.int8)
    check(linear, x, one, -1 - weight, one, None, None, one, torch.int8)


def test_empty() -> None:
    check(linear, randint8(0, 32), scales(), randint8(16, 32), scales(), None, None, None, torch.float32)


def test_more_rows_than_one_block_takes() -> None:
    check(linear, randint8(8, 16), scales(), randint8(50280, 16), scales(50280), None, None, None, torch.float16)
