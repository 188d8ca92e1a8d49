"""The quantized linear layer, against float64 products of its dequantized operands."""

import pytest
import torch
from torch import Tensor

from quamba.nn.linear import QuantizedLinear
from quamba.recipe import QuantSpec

SPECS = {"channel": QuantSpec("channel"), "tensor": QuantSpec("tensor"), "float": None}


def make(spec: str, *, bias: bool = True, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    """A filled layer, 13 -> 7."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantizedLinear(in_features=13, out_features=7, bias=bias, spec=SPECS[spec], dtype=dtype)
    weight = torch.randn(7, 13, generator=generator) * torch.linspace(0.2, 3.0, 7)[:, None]
    layer.fill(weight, torch.randn(7, generator=generator) if bias else None)
    return layer


def weight_of(layer: QuantizedLinear) -> Tensor:
    if layer.spec is None:
        return layer.weight.double()
    scale = layer.weight_scale.double()
    return layer.qweight.double() * (scale[:, None] if scale.dim() else scale)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("operand", ["tensor", "token", "float"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("shape", [(1,), (3, 5), (40,)])
def test_forward(spec: str, bias: bool, operand: str, residual: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer = make(spec, bias=bias)
    x: Tensor = torch.randint(-128, 128, (*shape, 13), dtype=torch.int8)
    scale: Tensor | None = torch.tensor(0.031)
    if operand == "token":
        scale = torch.rand(*shape, 1) + 0.01
    elif operand == "float":
        x, scale = torch.randn(*shape, 13), None
    added = torch.randn(*shape, 7) if residual else None

    expected = (x.double() if scale is None else x.double() * scale.double()) @ weight_of(layer).T
    expected = expected if layer.bias is None else expected + layer.bias.double()
    expected = expected if added is None else expected + added.double()
    found = layer(x, scale, out_dtype=torch.float32, residual=added)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    assert layer(x, scale, out_dtype=torch.bfloat16, residual=added).dtype == torch.bfloat16
    for out_scale in (torch.tensor(0.07), torch.rand(7) + 0.05):
        q = layer(x, scale, out_dtype=torch.int8, out_scale=out_scale, residual=added)
        steps = (expected / out_scale.double()).round().clamp(-128, 127) - q.double()
        assert q.dtype == torch.int8
        assert float(steps.abs().max()) <= 1
        assert int((steps != 0).sum()) <= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_the_weight_is_kept_to_half_a_step(spec: str, dtype: torch.dtype) -> None:
    weight = (torch.randn(7, 13) * torch.linspace(0.2, 3.0, 7)[:, None]).to(dtype)
    layer = QuantizedLinear(in_features=13, out_features=7, bias=True, spec=SPECS[spec], dtype=dtype)
    bias = torch.randn(7, dtype=dtype)
    layer.fill(weight, bias)
    if spec == "float":
        assert torch.equal(layer.float_weight(), weight.float())
        assert {name: b.dtype for name, b in layer.named_buffers()} == {"weight": dtype, "bias": dtype}
        return
    rows = weight.float().abs().amax(dim=1) if spec == "channel" else weight.float().abs().amax()
    torch.testing.assert_close(layer.weight_scale, rows / 127)
    error = (layer.float_weight() - weight.float()).abs()
    assert bool((error <= 0.5001 * (layer.weight_scale[:, None] if spec == "channel" else layer.weight_scale)).all())
    assert layer.float_weight(torch.bfloat16).dtype == torch.bfloat16
    assert layer.qweight.dtype == torch.int8
    assert torch.equal(layer.bias, bias)


def test_an_empty_layer_has_the_buffers_of_a_full_one() -> None:
    for spec in SPECS:
        empty = QuantizedLinear(in_features=13, out_features=7, bias=True, spec=SPECS[spec], dtype=torch.bfloat16)
        full = make(spec, dtype=torch.bfloat16)
        assert all(buffer.is_meta for buffer in empty.buffers())
        shapes = [{n: (b.shape, b.dtype) for n, b in layer.named_buffers()} for layer in (empty, full)]
        assert shapes[0] == shapes[1]
        empty.load_state_dict(full.state_dict(), assign=True)
        x = torch.randint(-128, 128, (4, 13), dtype=torch.int8)
        arguments = (x, torch.tensor(0.1))
        assert torch.equal(empty(*arguments, out_dtype=torch.float32), full(*arguments, out_dtype=torch.float32))


def test_filling_copies_nothing_into_the_callers_tensors() -> None:
    weight = torch.randn(7, 13)
    before = weight.clone()
    layer = QuantizedLinear(in_features=13, out_features=7, bias=False, spec=None, dtype=torch.float32)
    layer.fill(weight, None)
    assert torch.equal(weight, before)
    assert layer.bias is None
