"""percentile="search": each layer's clip of x, judged by what the whole model says.

The mixer's own output error can mis-rank clips (design, section 1.1), so a clip is judged by the Kullback-Leibler
divergence of the quantized model's next-token distribution from the float model's, on calibration data.
"""

from collections.abc import Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba.convert import refill_x
from quamba.data import Batch
from quamba.errors import CalibrationError
from quamba.models.adapter import Adapter, AnyMixer
from quamba.nn.mixer import Mixer
from quamba.nn.named import swap
from quamba.nn.quantized_mixer import QuantizedMixer
from quamba.observation import Plan, Statistics
from quamba.observers import ChannelPercentile, Histogram
from quamba.progress import track
from quamba.transforms import Transforms

# From tight to no clip at all; the last is where the search starts from.
CANDIDATES = (0.999, 0.9995, 0.9998, 0.9999, 0.99995, 0.99999, 1.0)
SEQUENCES = 8


@torch.no_grad()
def search_clips(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    converted: Mapping[int, AnyMixer],
    ends: Mapping[str, nn.Module],
    transforms: Mapping[int, Transforms],
    statistics: Statistics,
    plan: Plan,
    batches: Iterable[Batch],
    progress: bool | None = None,
) -> dict[int, tuple[float, Tensor]]:
    """Choose the clip of x layer by layer, the layers before it holding their choice already.

    Args:
        model: with the float mixers installed; left that way.
        adapter: the model's.
        mixers, converted: float and quantized mixer of every layer; the converted ones take the chosen clips.
        ends: the quantized embedding and head by module name.
        transforms: the coordinates of every block.
        statistics: of calibration; x was observed with quantiles.
        plan: the spec of every static site, for the headroom of x.
        batches: a few sequences to judge on.
        progress: as in `quantize`.

    Returns:
        layer -> (percentile, alpha) for every layer whose x has a static scale.
    """
    batches = list(batches)
    reference = [adapter.run_backbone(model, batch.input_ids, batch.mask) for batch in batches]
    float_head = model.get_submodule(adapter.head(model))
    old = {name: swap(model, name, module) for name, module in ends.items()}
    found: dict[int, tuple[float, Tensor]] = {}
    try:
        for layer, mixer in converted.items():
            adapter.shell_at(model, layer).mixer = mixer
        layers = [n for n, m in converted.items() if isinstance(m, QuantizedMixer) and hasattr(m, "x_scale")]
        for layer in track(layers, "searching clips", show=progress):
            target = converted[layer]
            observer = statistics.observers[f"layers.{layer}.x"]
            if not isinstance(observer, (Histogram, ChannelPercentile)) or not isinstance(target, QuantizedMixer):
                raise CalibrationError(
                    f"layers.{layer}.x: found {type(observer).__name__}; expected one with quantiles"
                )
            best: tuple[float, float, Tensor] | None = None
            # Over much data a channel keeps too few of its largest values to tell the tightest clips.
            least = observer.least if isinstance(observer, ChannelPercentile) else 0.0
            for level in (level for level in reversed(CANDIDATES) if level >= least):
                room = plan[f"layers.{layer}.x"].headroom
                alpha = room * torch.as_tensor(observer.quantile(level), dtype=torch.float32)
                refill_x(target, mixers[layer], transforms=transforms[layer], alpha=alpha)
                loss = _divergence(model, adapter, float_head, batches, reference)
                if best is None or loss < best[0]:
                    best = (loss, level, alpha)
            assert best is not None
            found[layer] = best[1:]
            refill_x(target, mixers[layer], transforms=transforms[layer], alpha=best[2])
    finally:
        for name, module in old.items():
            swap(model, name, module)
        for layer, mixer in mixers.items():
            adapter.shell_at(model, layer).mixer = mixer
    return found


def _divergence(
    model: nn.Module, adapter: Adapter, float_head: nn.Module, batches: list[Batch], reference: list[Tensor]
) -> float:
    """Mean KL(float || quantized) per token, in nats."""
    head = model.get_submodule(adapter.head(model))
    total = torch.zeros((), dtype=torch.float64)
    count = 0
    for batch, expected in zip(batches, reference, strict=True):
        hidden = adapter.run_backbone(model, batch.input_ids, batch.mask)
        rows = slice(None) if batch.mask is None else batch.mask.to(torch.bool)
        # A sequence at a time: the logits of a whole batch may not fit.
        for left, right in zip(_split(expected, rows), _split(hidden, rows), strict=True):
            p = F.log_softmax(float_head(left.to(_dtype(float_head))).to(torch.float32), dim=-1)
            q = F.log_softmax(head(right).to(torch.float32), dim=-1)
            total += (p.exp() * (p - q)).sum(dtype=torch.float64).cpu()
            count += left.shape[0]
    value = float(total) / max(count, 1)
    if value != value:
        raise CalibrationError("found NaN in the model's output while searching clips; check the float model")
    return value


def _split(hidden: Tensor, rows: slice | Tensor) -> tuple[Tensor, ...]:
    flat = hidden.flatten(0, 1) if isinstance(rows, slice) else hidden[rows]
    parts: tuple[Tensor, ...] = flat.split(512)  # type: ignore[no-untyped-call]
    return parts


def _dtype(module: nn.Module) -> torch.dtype:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.dtype
