"""linear_conv1d_step: CPU against the reference, and both against its two ops."""

import pytest
import torch

from quamba import ops

from .helpers import Source, assert_close, check_registration, clone


def arguments(b=3, e=24, d=10, k=4, *, channel=True, biases=True, per_token=False, float_taps=False, seed=0):
    source = Source(seed)

    def scale(size, around):
        return source.scale(*([size] if channel else []), around=around)

    return [
        source.int8(b, e),
        source.scale(b, 1) if per_token else source.scale(),
        source.int8(2 * d, e),
        scale(2 * d, 0.01),
        source.normal(2 * d) if biases else None,
        scale(2 * d, 0.1),
        source.normal(d, k) if float_taps else source.int8(d, k),
        None if float_taps else scale(d, 0.01),
        source.normal(d) if biases else None,
        scale(d, 0.02),
        source.int8(b, d, k),
    ]


VARIANTS = [{}, {"channel": False}, {"biases": False}, {"per_token": True}, {"float_taps": True}, {"k": 3}]


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 24, 10), (17, 129, 33)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_against_its_two_ops(size, variant):
    args = arguments(*size, **variant)
    d, state = size[2], args[10].clone()
    xz = ops.linear(*args[:5], None, args[5], torch.int8)
    x0_scale = args[5][:d] if args[5].dim() else args[5]
    x = ops.causal_conv1d_step(xz[:, :d], x0_scale, *args[6:10], torch.int8, state)
    both = clone(args)
    found = ops.linear_conv1d_step(*both)
    assert torch.equal(found[0], x)
    assert torch.equal(found[1], xz[:, d:])
    assert torch.equal(both[10], state)
    assert not torch.equal(state, args[10])
    with ops.reference():
        reference = ops.linear_conv1d_step(*clone(args))
    for actual, expected in zip(found, reference, strict=True):
        assert_close(actual, expected)


def test_registration():
    check_registration(ops.linear_conv1d_step, arguments())
