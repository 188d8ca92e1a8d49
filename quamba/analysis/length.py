"""Does the error grow along a sequence? The quantized model beside the float one, position by position."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba.analysis.study import OpenModel
from quamba.data import batches
from quamba.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class PositionErrors:
    """Errors of whole quantized models by position in the sequence.

    Attributes:
        names: R models.
        nmse: float64 (R, L), squared error of the hidden states before the head over their squares, summed over the
            sequences.
        kl: float64 (R, L), KL divergence of the next-token distribution from the float model's, in nats, mean over
            the sequences.
        sequences: how many.
    """

    names: tuple[str, ...]
    nmse: Tensor
    kl: Tensor
    sequences: int


@torch.no_grad()
def position_errors(opened_model: OpenModel, others: Mapping[str, nn.Module], data: Iterable[Any]) -> PositionErrors:
    """Compare quantized models with the float one they were made from.

    Args:
        opened_model: the float model.
        others: name -> quantized model of the same family and sizes.
        data: sequences of one length without padding, as for `quamba.quantize`.

    Raises:
        CalibrationError: the data is malformed, padded, or of several lengths.
    """
    adapter = opened_model.adapter
    noise: dict[str, Tensor] = {}
    divergence: dict[str, Tensor] = {}
    signal: Tensor | None = None
    sequences = 0
    for batch in batches(data, samples=None, device=opened_model.device):
        for row in range(batch.rows):
            ids = batch.input_ids[row : row + 1]
            if batch.mask is not None or (signal is not None and ids.shape[1] != signal.shape[0]):
                raise CalibrationError("found sequences with padding or of several lengths; expected one length")
            hidden = adapter.run_backbone(opened_model.model, ids, None)[0]
            expected = _log_probabilities(opened_model.model, adapter.head(opened_model.model), hidden)
            own = hidden.to(torch.float64).square().sum(dim=1).cpu()
            signal = own if signal is None else signal + own
            sequences += 1
            for name, model in others.items():
                found = adapter.run_backbone(model, ids, None)[0]
                log = _log_probabilities(model, adapter.head(model), found)
                squared = (found.to(torch.float64) - hidden.to(torch.float64)).square().sum(dim=1).cpu()
                kl = (expected.exp() * (expected - log)).sum(dim=1).to(torch.float64).cpu()
                noise[name] = noise[name] + squared if name in noise else squared
                divergence[name] = divergence[name] + kl if name in divergence else kl
    if signal is None:
        raise CalibrationError("found no sequences; expected at least one")
    return PositionErrors(
        names=tuple(others),
        nmse=torch.stack([noise[name] / signal for name in others]),
        kl=torch.stack([divergence[name] / sequences for name in others]),
        sequences=sequences,
    )


def _log_probabilities(model: nn.Module, head: str, hidden: Tensor) -> Tensor:
    logits: Tensor = model.get_submodule(head)(hidden)
    return F.log_softmax(logits.to(torch.float32), dim=-1)
