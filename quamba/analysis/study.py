"""A float model laid open for analysis: our mixers in it, and the scales and coordinates that a recipe would use."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quamba import calibration
from quamba.analysis.tap import Scan, ScanTap
from quamba.data import Batch, KeptBatches
from quamba.errors import CalibrationError, RecipeError, UnsupportedModelError
from quamba.models.adapter import Adapter, Shell, find_adapter
from quamba.nn.mixer import Mixer
from quamba.nn.named import swap
from quamba.recipe import Recipe
from quamba.transforms import Transforms


@dataclass(frozen=True, eq=False)
class OpenModel:
    """A model with our float mixers in place of its own.

    Attributes:
        model: in evaluation mode.
        adapter: its family's.
        mixers: by layer number.
    """

    model: nn.Module
    adapter: Adapter
    mixers: Mapping[int, Mixer]

    @property
    def layers(self) -> tuple[int, ...]:
        """The numbers of the layers with a Mamba mixer."""
        return tuple(self.mixers)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device


@contextmanager
def opened(model: nn.Module) -> Iterator[OpenModel]:
    """The model with our float mixers installed, for the length of the block; afterwards it is as it was.

    Raises:
        UnsupportedModelError: quamba does not know the model, or it is quantized.
    """
    adapter = find_adapter(model)
    if any(isinstance(module, Shell) for module in model.modules()):
        raise UnsupportedModelError("found a model that quamba has quantized already; expected a float model")
    training = model.training
    model.eval()
    originals: dict[str, nn.Module] = {}
    try:
        mixers = {n: Mixer(adapter.config(model, n), adapter.tensors(model, n)) for n in adapter.layers(model)}
        for layer, mixer in mixers.items():
            originals |= adapter.install(model, layer, mixer)
        yield OpenModel(model, adapter, mixers)
    finally:
        for name, module in originals.items():
            swap(model, name, module)
        model.train(training)


@contextmanager
def replaced(opened_model: OpenModel, mixers: Mapping[int, nn.Module], ends: Mapping[str, nn.Module]) -> Iterator[None]:
    """Other mixers by layer, and other ends by module name, for the length of the block."""
    model, adapter = opened_model.model, opened_model.adapter
    old = {name: swap(model, name, module) for name, module in ends.items()}
    for layer, mixer in mixers.items():
        # Whatever maps hidden states to hidden states serves as a mixer here.
        shell: Any = adapter.shell_at(model, layer)
        shell.mixer = mixer
    try:
        yield
    finally:
        for name, module in old.items():
            swap(model, name, module)
        for layer, mixer in opened_model.mixers.items():
            adapter.shell_at(model, layer).mixer = mixer


@dataclass(frozen=True, eq=False)
class Study:
    """What calibration finds for one recipe on one model.

    Attributes:
        opened: the model.
        recipe: the recipe.
        transforms: the coordinates of each layer.
        head_divisor: (E,) by which head.input is divided, or None.
        alphas: address -> clipping magnitude, of the shape of the scale.
        y_alphas: layer -> largest |y|, float32 (); y is no site of a recipe.
    """

    opened: OpenModel
    recipe: Recipe
    transforms: Mapping[int, Transforms]
    head_divisor: Tensor | None
    alphas: Mapping[str, Tensor]
    y_alphas: Mapping[int, Tensor]


def check_separable(recipe: Recipe) -> None:
    """Raise RecipeError for a recipe whose tensors cannot be quantized one at a time."""
    if recipe.rotates_residual:
        raise RecipeError(
            f"found recipe {recipe.name!r}, which rotates the residual stream; expected one whose sites can be "
            "quantized one at a time"
        )


@torch.no_grad()
def study(opened_model: OpenModel, recipe: Recipe, calib_data: Iterable[Any], *, progress: bool | None = None) -> Study:
    """Calibrate a recipe without converting anything.

    Args:
        opened_model: the model.
        recipe: one that leaves the residual stream as it is.
        calib_data: as for `quamba.quantize`.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        RecipeError: the recipe rotates the residual stream, which no single site could be taken out of; or an
            override matches nothing.
        CalibrationError: the data is malformed or empty, or the model produced NaN on it.
    """
    check_separable(recipe)
    model, adapter, mixers = opened_model.model, opened_model.adapter, opened_model.mixers
    recipe.check(mixers)
    data = KeptBatches(calib_data, samples=None, device=opened_model.device)

    plan = calibration.static_plan(recipe, mixers)
    try:
        found = calibration.calibrate(
            recipe, model=model, adapter=adapter, mixers=mixers, plan=plan, data=data, show=progress
        )
    finally:
        for mixer in mixers.values():
            mixer.transforms = Transforms()
    return Study(
        opened=opened_model,
        recipe=recipe,
        transforms=found.transforms,
        head_divisor=found.head_divisor,
        alphas=found.alphas,
        y_alphas=_scan_ranges(opened_model, data),
    )


@torch.no_grad()
def watch_scans(opened_model: OpenModel, batches: Iterable[Batch]) -> Iterator[dict[int, Scan]]:
    """Run the float model over the batches; yields each batch's scans by layer.

    Raises:
        CalibrationError: a layer did not run exactly one scan, or a batch has padding.
    """
    for batch in batches:
        if batch.mask is not None:
            raise CalibrationError("found padded sequences; expected rows of one length for the analysis")
        seen: list[Scan] = []
        with ScanTap(seen.append):
            opened_model.adapter.run_backbone(opened_model.model, batch.input_ids, None)
        if len(seen) != len(opened_model.layers):
            raise CalibrationError(
                f"found {len(seen)} scans in one pass over {len(opened_model.layers)} Mamba layers; expected one each"
            )
        yield dict(zip(opened_model.layers, seen, strict=True))


def _scan_ranges(opened_model: OpenModel, batches: Iterable[Batch]) -> dict[int, Tensor]:
    largest: dict[int, Tensor] = {}
    for scans in watch_scans(opened_model, batches):
        for layer, scan in scans.items():
            found = scan.y.abs().amax()
            largest[layer] = torch.maximum(largest[layer], found) if layer in largest else found
    if not largest:
        raise CalibrationError("found no calibration data; expected at least one sequence")
    return largest
