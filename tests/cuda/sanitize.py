"""Every kernel a few times over odd shapes, for `compute-sanitizer --tool TOOL python -m tests.cuda.sanitize`.

racecheck knows barriers only: QUAMBA_SCAN_RELAY=0 leaves out the scan whose warps wait for words in shared memory.
synccheck tracks fewer barriers than that scan has, and fails, unless it is told: `--num-cuda-barriers 256`.
"""

import os

import torch

from quamba import ops
from quamba.ops import OPS
from tests.cuda.compare import randint8, randn, scales, sliced


def linear() -> None:
    for m, n, k in (
        (1, 33, 48),
        (1, 4100, 160),
        (3, 200, 112),
        (16, 48, 2048),
        (25, 64, 4160),
        (70, 256, 256),
        (5, 9, 7),
    ):
        x, weight = randint8(m, k), randint8(n, k)
        residual, bias = randn(m, n, dtype=torch.float16), randn(n)
        ops.linear(x, scales(m, 1), weight, scales(n), bias, residual, None, torch.float16)
        ops.linear(x, scales(), weight, scales(n), None, None, scales(n), torch.int8)
    os.environ["QUAMBA_LINEAR_KERNEL"] = "ring"
    for m, n, k in ((9, 100, 1040), (20, 161, 160), (64, 192, 5120), (70, 2570, 48), (300, 97, 1040)):
        residual = randn(m, n, dtype=torch.float16)
        ops.linear(randint8(m, k), scales(), randint8(n, k), scales(n), None, residual, None, torch.float32)
        ops.linear(randint8(m, k), scales(m, 1), randint8(n, k), scales(n), None, None, scales(n), torch.int8)
    for b, d, e in ((9, 100, 160), (64, 264, 48), (20, 40, 1040)):
        args = (randint8(b, e), scales(), randint8(2 * d, e), scales(2 * d), None, scales(2 * d), randint8(d, 4))
        ops.linear_conv1d_step(*args, scales(d), randn(d), scales(d), randint8(b, d, 4))
    for kernel, n in (("short", 264), ("strips", 320)):
        os.environ["QUAMBA_LINEAR_KERNEL"] = kernel
        for m, k in ((1, 16), (33, 48), (90, 96), (17, 128), (300, 160), (40, 256)):
            for x_scale in (scales(), scales(m, 1)):
                ops.linear(randint8(m, k), x_scale, randint8(n, k), scales(n), None, None, scales(n), torch.int8)
    os.environ["QUAMBA_LINEAR_KERNEL"] = "slices"
    for m, n, k in ((5, 36, 144), (70, 192, 1040), (300, 80, 1536), (130, 288, 656)):
        ops.linear(randint8(m, k), scales(m, 1), randint8(n, k), scales(n), None, None, None, torch.float16)
        ops.linear(randint8(m, k), scales(), randint8(n, k), scales(n), None, None, scales(n), torch.int8)
    for kernel in ("pairs", "halves", "quads"):
        os.environ["QUAMBA_LINEAR_KERNEL"] = kernel
        for m, n, k in ((70, 96, 272), (300, 352, 400), (520, 224, 1040)):
            x, weight, residual = randint8(m, k), randint8(n, k), sliced(randn(m, n))
            ops.linear(x, scales(m, 1), weight, scales(n), None, residual, None, torch.float32)
            if kernel == "pairs":
                ops.linear(x, scales(), weight, scales(n), None, None, scales(n), torch.int8)
    del os.environ["QUAMBA_LINEAR_KERNEL"]
    for m, n, k in ((300, 512, 128), (2048, 640, 128), (513, 2560, 64)):
        ops.linear(randint8(m, k), scales(), randint8(n, k), scales(n), None, None, scales(), torch.int8)


def rows() -> None:
    for shape in ((3, 7), (5, 768), (2, 1000), (600, 776)):
        x = randn(*shape, dtype=torch.float16)
        ops.quantize(x, scales(shape[1]))
        ops.quantize_per_token(x)
        ops.rms_norm_quant(x, randn(shape[1]), scales(), 1e-5)
    for size in (1, 12, 20, 52, 60, 96, 100, 160, 256, 512, 1536, 2048, 5120, 8192):
        for dtype in (torch.float16, torch.float32):
            ops.hadamard(randn(3, size, dtype=dtype))
            ops.hadamard_quant(randn(3, size, dtype=dtype), scales(size))
    for size in (2048, 3072, 5120, 8192):
        for scale in (scales(), scales(size)):
            ops.hadamard_quant(randn(1100, size, dtype=torch.float16), scale)
    ops.embedding(torch.randint(0, 50, (7,), device="cuda"), randint8(50, 33), scales(50), scales(33), torch.float16)


def conv() -> None:
    for length, channels, width in ((1, 6, 4), (37, 72, 4), (37, 70, 3), (5, 8, 8)):
        for x in (randint8(2, length, channels), randn(2, length, channels, dtype=torch.float16)):
            state = torch.zeros(2, channels, width, dtype=x.dtype, device="cuda")
            mask = torch.rand(2, length, device="cuda") < 0.5
            args = (scales(), randn(channels, width), None, randn(channels), scales(channels), torch.int8)
            ops.causal_conv1d(sliced(x), *args, mask, state)
            ops.causal_conv1d_step(x[:, 0].contiguous(), *args, state)
    for batch, length, channels in ((2, 3, 8), (1, 2048, 516), (3, 601, 5120)):
        args = (scales(), randint8(channels, 4), scales(channels), randn(channels), scales(channels), torch.int8)
        for mask in (None, torch.rand(batch, length, device="cuda") < 0.5):
            ops.causal_conv1d(sliced(randint8(batch, length, channels)), *args, mask, randint8(batch, channels, 4))


def scan() -> None:
    for channels, states, length in (
        (24, 16, 70),
        (50, 5, 33),
        (1536, 16, 40),
        (5120, 16, 40),
        (20480, 16, 33),
        (9, 40, 65),
        (44, 16, 530),
        (88, 16, 530),
        (1536, 16, 520),
    ):
        wide, narrow = (1, length, channels), (1, length, states)
        x, dt, z, b, c = randint8(*wide), randint8(*wide), randint8(*wide), randint8(*narrow), randint8(*narrow)
        state = torch.zeros(1, channels, states, device="cuda")
        bias, a, d = randn(channels), -torch.rand(channels, states, device="cuda"), randn(channels)
        args = (scales(), dt, scales(), bias, a, b, scales(), c, scales(states), d, z, scales(), None, torch.float16)
        ops.selective_scan(x, *args, state)
        ops.selective_scan(x.half(), *args, None)
        one = [v[:, 0] if v is dt or v is z or v is b or v is c else v for v in args]
        ops.selective_scan_step(x[:, 0], *one, state)
    shapes = ((1, 40, 16, 48), (5, 70, 16, 160), (4, 33, 20, 272), (3, 9, 5, 7), (9, 5, 16, 16), (37, 140, 16, 208))
    for batch, channels, states, rank in shapes:
        wide, narrow = (batch, channels), (batch, states)
        x, z, b, c = randint8(*wide), randint8(*wide), randint8(*narrow), randint8(*narrow)
        state, a = torch.zeros(batch, channels, states, device="cuda"), -torch.rand(channels, states, device="cuda")
        rest = (randn(channels), a, b, scales(), c, scales(states), randn(channels), z, scales(), None, torch.float16)
        ops.selective_scan_step(x, scales(), randint8(*wide), scales(channels), *rest, state)
        product = (sliced(randint8(batch, rank)), scales(), randint8(channels, rank), scales(channels))
        ops.selective_scan_dt_step(x, scales(), *product, scales(), *rest, state)


if __name__ == "__main__":
    assert ops.cuda.MISSING is None, ops.cuda.MISSING
    for part in (linear, rows, conv, scan):
        part()
        torch.cuda.synchronize()
    print(f"{len(OPS)} ops")
