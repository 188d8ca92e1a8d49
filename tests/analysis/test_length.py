"""Errors by position against NumPy."""

import pytest
import torch
from torch import nn

import quamba
from quamba.analysis.length import position_errors
from quamba.analysis.study import opened
from quamba.errors import CalibrationError
from tests.tiny import make_model, token_ids


@torch.no_grad()
def test_against_the_models_themselves() -> None:
    data = token_ids(3, 10, seed=7)
    model, quantized = make_model("mamba"), make_model("mamba")
    quamba.quantize(quantized, [token_ids(4, 10)], "naive")
    with opened(model) as open_model:
        found = position_errors(open_model, {"same": model, "naive": quantized}, [data[:2], data[2:]])
    assert (found.names, found.sequences) == (("same", "naive"), 3)
    assert float(found.nmse[0].max()) == float(found.kl[0].abs().max()) == 0
    hidden, other = (last_hidden(m, data).double() for m in (model, quantized))
    expected = (other - hidden).square().sum(dim=(0, 2)) / hidden.square().sum(dim=(0, 2))
    torch.testing.assert_close(found.nmse[1], expected, rtol=1e-3, atol=1e-9)
    p, q = (torch.log_softmax(m(data).logits.double(), dim=-1) for m in (model, quantized))
    torch.testing.assert_close(found.kl[1], (p.exp() * (p - q)).sum(dim=-1).mean(dim=0), rtol=1e-3, atol=1e-6)
    assert float(found.kl[1].min()) > 0


def last_hidden(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = model(ids, output_hidden_states=True).hidden_states[-1]
    return out


def test_malformed_data_is_refused() -> None:
    with opened(make_model("mamba")) as model:
        with pytest.raises(CalibrationError, match="several lengths"):
            position_errors(model, {}, [token_ids(1, 4), token_ids(1, 5)])
        with pytest.raises(CalibrationError, match="single sequence"):
            position_errors(model, {}, [])
