import pytest
import torch

from quamba.ops import causal_conv1d_step, linear, linear_conv1d_step
from tests.cuda.compare import randint8, randn, scales, sliced


def arguments(batch: int, width: int, channels: int, *, taps: int = 4, channel: bool = True, weight=torch.int8):
    shape = (channels,) if channel else ()
    size = 1.0 / (width**0.5 * 74 * 74) * 30
    quantized = weight == torch.int8
    return [
        randint8(batch, width),
        torch.tensor(size, device="cuda"),
        randint8(2 * channels, width),
        scales(2 * channels, mean=1.0),
        randn(2 * channels, dtype=torch.float16),
        scales(2 * channels, mean=0.5) if channel else scales(mean=0.5),
        randint8(channels, taps) if quantized else randn(channels, taps, dtype=weight),
        scales(*shape, mean=0.01) if quantized else None,
        randn(channels, dtype=torch.float16),
        scales(*shape),
        randint8(batch, channels, taps),
    ]


def compare(args) -> None:
    """Exactly what the two ops give."""
    channels, state = args[6].shape[0], args[10].clone()
    xz = linear(*args[:5], None, args[5], torch.int8)
    x0_scale = args[5][:channels] if args[5].dim() else args[5]
    expected = causal_conv1d_step(xz[:, :channels], x0_scale, *args[6:10], torch.int8, state)
    mine = args[10].clone()
    x, z = linear_conv1d_step(*args[:10], mine)
    assert torch.equal(x, expected)
    assert torch.equal(z, xz[:, channels:])
    assert torch.equal(mine, state)
    assert not torch.equal(mine, args[10])
    assert x.float().std() > 1
    assert z.float().std() > 1


@pytest.mark.parametrize("kernel", [None, "ring"])
@pytest.mark.parametrize("batch", [1, 9, 16, 17, 33, 64, 130])
@pytest.mark.parametrize(("width", "channels"), [(64, 8), (160, 100), (2560, 5120), (768, 1536), (36, 10)])
def test_shapes(monkeypatch: pytest.MonkeyPatch, kernel, batch, width, channels) -> None:
    if kernel is not None:
        monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", kernel)
    compare(arguments(batch, width, channels))


@pytest.mark.parametrize("variant", [{"channel": False}, {"taps": 3}, {"weight": torch.float16}])
def test_variants(monkeypatch: pytest.MonkeyPatch, variant) -> None:
    monkeypatch.setenv("QUAMBA_LINEAR_KERNEL", "ring")
    compare(arguments(20, 160, 100, **variant))
    args = arguments(20, 160, 100, **variant)
    args[4] = args[8] = None
    args[0] = sliced(args[0])
    compare(args)
