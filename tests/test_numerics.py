"""Rounding, clamping and scales against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quamba import numerics
from quamba.errors import CalibrationError

values = st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40)
scales = st.floats(2.0**-20, 2.0**14, width=32)


@given(values, scales)
@settings(deadline=None, max_examples=60)
def test_quantize_is_round_half_even_then_clamp(numbers, scale):
    x, s = np.array(numbers, dtype=np.float32), np.float32(scale)
    expected = np.clip(np.rint(x / s), -128, 127)
    assert np.array_equal(numerics.quantize(torch.from_numpy(x), torch.tensor(s)).numpy(), expected)


@given(values)
@settings(deadline=None, max_examples=60)
def test_round_trip_within_half_a_step(numbers):
    x = torch.tensor(numbers)
    scale = numerics.scale_from_alpha(x.abs().amax())
    back = numerics.dequantize(numerics.quantize(x, scale), scale)
    assert float((back - x).abs().max()) <= float(scale) * 0.5001


@given(values)
@settings(deadline=None, max_examples=30)
def test_integers_survive_requantization(numbers):
    q = torch.tensor(numbers).clamp(-128, 127).to(torch.int8)
    scale = torch.tensor(0.0371)
    assert torch.equal(numerics.quantize(numerics.dequantize(q, scale), scale), q)


def test_ties():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, 127.5, -128.5])
    assert numerics.quantize(x, torch.tensor(1.0)).tolist() == [0, 2, 2, 0, -2, -2, 126, 127, -128]


def test_to_int8_overwrites_its_argument():
    x = torch.tensor([[0.4, 300.0], [-300.0, 2.5]])
    assert numerics.to_int8_(x).tolist() == [[0, 127], [-128, 2]]
    assert x.tolist() == [[0, 127], [-128, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("source", [torch.int8, torch.float32, torch.float16])
@pytest.mark.parametrize(
    "scale", [None, torch.tensor(0.5), torch.tensor([0.5, 2.0, 4.0]), torch.tensor([[1.0], [2.0]])]
)
def test_dequantize(dtype, source, scale):
    q = torch.tensor([[1, -2, 3], [4, 5, -128]]).to(source)
    before = q.clone()
    out = numerics.dequantize(q, scale, dtype)
    factor = 1 if scale is None else scale.numpy()
    assert out.dtype == dtype
    assert np.array_equal(out.to(torch.float64).numpy(), before.to(torch.float64).numpy() * factor)
    assert torch.equal(q, before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_scale_from_bad_alpha_raises(bad):
    with pytest.raises(CalibrationError, match="NaN, infinite or negative"):
        numerics.scale_from_alpha(torch.tensor([1.0, bad]))


def test_scale_from_alpha():
    out = numerics.scale_from_alpha(torch.tensor([0.0, 127.0, 1e-30, 254.0], dtype=torch.float64))
    assert out.dtype == torch.float32
    np.testing.assert_allclose(out.numpy(), [1e-8 / 127, 1, 1e-8 / 127, 2], rtol=1e-6)


@pytest.mark.parametrize("shape", [(5, 7), (5, 1, 4)])
@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_weight(shape, per_channel):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    weight[2] = 0
    q, scale = numerics.quantize_weight(weight, per_channel=per_channel)
    assert (q.dtype, q.shape) == (torch.int8, weight.shape)
    assert scale.shape == ((5,) if per_channel else ())
    wide = weight.to(torch.float64)
    absmax = wide.flatten(1).abs().amax(1) if per_channel else wide.abs().amax()
    torch.testing.assert_close(scale.double(), absmax.clamp(min=1e-8) / 127, rtol=1e-6, atol=0)
    step = scale.reshape(-1, *[1] * (weight.dim() - 1)) if per_channel else scale
    assert ((q * step - wide).abs() <= 0.5001 * step).all()


@pytest.mark.parametrize("per_channel", [True, False])
def test_quantize_weight_takes_columns_in_first(per_channel):
    weight = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    columns = torch.logspace(-2, 2, 7)
    q, scale = numerics.quantize_weight(weight, per_channel=per_channel, columns=columns)
    expected = numerics.quantize_weight(weight.float() * columns, per_channel=per_channel)
    assert torch.equal(q, expected[0])
    assert torch.equal(scale, expected[1])


def test_token_scale():
    x = torch.tensor([[1.0, -254.0], [0.0, 0.0]], dtype=torch.bfloat16)
    out = numerics.token_scale(x)
    assert out.shape == (2, 1)
    np.testing.assert_allclose(out.numpy(), [[2], [1e-8 / 127]], rtol=1e-6)


def test_sqnr_db():
    reference = torch.tensor([10.0, 0.0])
    assert numerics.sqnr_db(reference, torch.tensor([9.0, 0.0])) == pytest.approx(20.0)
    assert numerics.sqnr_db(reference, reference) > 300


@pytest.mark.parametrize("bits", range(2, 9))
def test_simulate_is_round_half_even_then_clamp(bits):
    largest = 2 ** (bits - 1) - 1
    x = np.random.default_rng(bits).standard_normal((7, 5)).astype(np.float32) * 3
    scale = numerics.scale_from_alpha(torch.tensor(2.0), bits=bits)
    assert float(scale) == pytest.approx(2.0 / largest)
    expected = np.clip(np.rint(x / scale.numpy()), -largest - 1, largest) * scale.numpy()
    np.testing.assert_allclose(numerics.simulate(torch.from_numpy(x), scale, bits=bits).numpy(), expected, rtol=1e-6)
    assert numerics.token_scale(torch.from_numpy(x), bits=bits).shape == (7, 1)
    np.testing.assert_allclose(
        numerics.token_scale(torch.from_numpy(x), bits=bits)[:, 0].numpy(), np.abs(x).max(1) / largest, rtol=1e-6
    )


@pytest.mark.parametrize("per_channel", [True, False])
def test_with_8_bits_a_simulated_weight_is_the_quantized_one(per_channel):
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)[:, None]
    q, scale = numerics.quantize_weight(weight, per_channel=per_channel)
    expected = q * (scale[:, None] if per_channel else scale)
    assert torch.equal(numerics.simulate_weight(weight, per_channel=per_channel, bits=8), expected)
