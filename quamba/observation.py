"""Observation: run the float model over the data and hand the values at its sites to observers, or to anyone else."""

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from quamba.data import Batch
from quamba.errors import CalibrationError
from quamba.models.adapter import Adapter
from quamba.nn.mixer import Mixer
from quamba.observers import Observer, make_observer
from quamba.progress import track
from quamba.recipe import QuantSpec

Plan = Mapping[str, QuantSpec]


@dataclass
class Statistics:
    """What was observed, by address. Statistics of shards of the data merge into those of the whole."""

    observers: dict[str, Observer] = field(default_factory=dict)

    def update(self, address: str, spec: QuantSpec, values: Tensor) -> None:
        """Add values (T, D) of one site, padding removed."""
        if address not in self.observers:
            self.observers[address] = make_observer(spec)
        try:
            self.observers[address].update(values)
        except CalibrationError as error:
            raise CalibrationError(f"{address}: {error}") from error

    def merge(self, other: "Statistics") -> None:
        """Take in the statistics of another shard, observed with the same plan."""
        for address, observer in other.observers.items():
            if address in self.observers:
                self.observers[address].merge(observer)
            else:
                self.observers[address] = observer

    def alpha(self, address: str) -> Tensor:
        """The clipping magnitude of one address. Raises CalibrationError where nothing was observed."""
        if address not in self.observers:
            raise CalibrationError(
                f"found no statistic for {address}; expected calibration data with at least one token: pass calib_data"
            )
        return self.observers[address].alpha()

    def alphas(self, plan: Plan) -> dict[str, Tensor]:
        """The clipping magnitude of every planned address, with the headroom that its spec asks for."""
        return {address: spec.headroom * self.alpha(address) for address, spec in plan.items()}


@torch.no_grad()
def collect(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    plan: Plan,
    batches: Iterable[Batch],
    description: str = "calibrating",
    total: int | None = None,
    show: bool | None = None,
    head_divisor: Tensor | None = None,
) -> Statistics:
    """Run the model over the batches and observe the planned addresses.

    Args:
        model: with our float mixers installed.
        adapter: the model's.
        mixers: the installed mixers by layer; each observes in the coordinates of its `transforms`.
        plan: address -> spec.
        batches: calibration data.
        description, total, show: of the progress bar.
        head_divisor: (E,) by which head.input is divided before it is observed, or None.

    Raises:
        CalibrationError: a site produced NaN or infinite values; the message names its address.
    """
    statistics = Statistics()
    observe(
        model=model,
        adapter=adapter,
        mixers=mixers,
        batches=track(batches, description, total=total, show=show),
        addresses=plan,
        head_divisor=head_divisor,
        see=lambda address, values: statistics.update(address, plan[address], values),
    )
    return statistics


def observe(
    *,
    model: nn.Module,
    adapter: Adapter,
    mixers: Mapping[int, Mixer],
    batches: Iterable[Batch],
    addresses: Container[str],
    head_divisor: Tensor | None,
    see: Callable[[str, Tensor], None],
) -> None:
    """Run the batches and hand the values (T, D) of each of the addresses, padding removed, to `see`."""

    def look(address: str, value: Tensor, mask: Tensor | None) -> None:
        if address in addresses:
            see(address, _tokens(value, mask))

    def watch(layer: int, mixer: Mixer) -> None:
        mixer.observer = lambda site, value, mask: look(f"layers.{layer}.{site}", value, mask)

    try:
        for layer, mixer in mixers.items():
            watch(layer, mixer)
        for batch in batches:
            hidden = adapter.run_backbone(model, batch.input_ids, batch.mask)
            look("head.input", hidden if head_divisor is None else hidden / head_divisor, batch.mask)
    finally:
        for mixer in mixers.values():
            mixer.observer = None


def _tokens(value: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, D) -> (T, D): the tokens that are not padding."""
    return value.flatten(0, 1) if mask is None else value[mask.to(torch.bool)]
