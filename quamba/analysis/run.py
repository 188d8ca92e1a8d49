"""The whole analysis of one model: every measurement of this package, over one text."""

import copy
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import quamba
from quamba.analysis.decay import Decay, decay
from quamba.analysis.hippo import SYSTEMS, Bound, error_bound
from quamba.analysis.length import PositionErrors, position_errors
from quamba.analysis.outliers import Outliers, outliers
from quamba.analysis.sensitivity import (
    BlockErrors,
    Cost,
    block_errors,
    cost,
    tensor_costs,
)
from quamba.analysis.single import TENSORS, quantized_alike
from quamba.analysis.study import OpenModel, Study, check_separable, opened, study
from quamba.errors import CalibrationError, RecipeError
from quamba.eval.perplexity import CachedLogits, cache_logits
from quamba.models.adapter import model_type_of
from quamba.recipe import Recipe
from quamba.recipes import DEFAULT_RECIPE, get_recipe
from quamba.text import windows

RECIPES = ("naive", DEFAULT_RECIPE)


@dataclass(frozen=True)
class Settings:
    """How much is measured.

    Attributes:
        context: tokens per sequence of calibration, of the blocks' errors and of perplexity.
        calibration_sequences: how many of `context` tokens.
        windows: of `context` tokens, for perplexity and KL.
        sequences: of `context` tokens, for the blocks' errors, the outliers and the decay.
        long_context: tokens per sequence of the errors by position.
        long_sequences: how many of those.
        batch_size: windows per forward pass.
    """

    context: int = 512
    calibration_sequences: int = 64
    windows: int = 48
    sequences: int = 8
    long_context: int = 2048
    long_sequences: int = 4
    batch_size: int = 8

    @property
    def evaluation_tokens(self) -> int:
        """How many tokens the evaluation text must have."""
        return max(self.context * max(self.windows, self.sequences), self.long_context * self.long_sequences)


@dataclass(frozen=True, eq=False)
class Analysis:
    """All that was found.

    Attributes:
        about: JSON: the settings, the model, versions, machine, date, seconds.
        errors: for each recipe.
        costs: for each recipe, its tensors one at a time and then "all".
        outliers: by view.
        decay: of the float model.
        bounds: of HiPPO's systems.
        positions: of the recipes' models.
    """

    about: Mapping[str, Any]
    errors: tuple[BlockErrors, ...]
    costs: tuple[Cost, ...]
    outliers: Mapping[str, Outliers]
    decay: Decay
    bounds: tuple[Bound, ...]
    positions: PositionErrors


def analyze(
    model: nn.Module,
    calibration: Tensor,
    evaluation: Tensor,
    *,
    recipes: Sequence[str | Recipe] = RECIPES,
    settings: Settings | None = None,
    progress: bool | None = None,
) -> Analysis:
    """Measure everything. The model is float and is left as it was; each recipe quantizes a copy of it.

    Memory: two copies of the model, and the float model's logits over the windows (4 bytes for each token and each
    word of the vocabulary).

    Args:
        model: a causal language model that `quamba.quantize` takes; float32 tells quantization from other rounding.
        calibration: int64 (T,), at least one sequence of `context` tokens.
        evaluation: int64 (T,), at least `settings.evaluation_tokens`, from elsewhere than the calibration.
        recipes: names, or recipes with names of their own; the last one's coordinates are those of "g*" among the
            outliers.
        settings: how much is measured; None for the defaults.
        progress: show progress bars; None shows them on a terminal.

    Raises:
        UnsupportedModelError: quamba does not know the model, or it is quantized.
        RecipeError: a recipe does not exist, rotates the residual stream, or shares its name with another.
        CalibrationError: a text is too short, or the model produced NaN.
    """
    settings = settings or Settings()
    chosen = {recipe.name: recipe for recipe in map(get_recipe, recipes)}
    if not chosen or len(chosen) < len(recipes):
        raise RecipeError(f"found recipes of the names {list(chosen)}; expected one or more, each with its own name")
    for recipe in chosen.values():
        check_separable(recipe)
    if evaluation.shape[0] < settings.evaluation_tokens:
        raise CalibrationError(
            f"found {evaluation.shape[0]} tokens to evaluate on; expected at least {settings.evaluation_tokens}: "
            "give more text, or fewer or shorter windows"
        )
    start = time.perf_counter()
    sequences = windows(calibration, length=settings.context, count=settings.calibration_sequences)
    calibration_batches = [sequences[i : i + 8] for i in range(0, len(sequences), 8)]
    short = evaluation[: settings.sequences * settings.context].view(settings.sequences, settings.context)
    long = evaluation[: settings.long_sequences * settings.long_context].view(settings.long_sequences, -1)
    ids = evaluation[: settings.windows * settings.context]
    quantized = {
        name: quamba.quantize(copy.deepcopy(model), calibration_batches, recipe, samples=None, progress=progress)
        for name, recipe in chosen.items()
    }
    with opened(model) as open_model:
        studies = [study(open_model, own, calibration_batches, progress=progress) for own in chosen.values()]
        reference = cache_logits(
            model, ids, context=settings.context, batch_size=settings.batch_size, progress=progress
        )
        costs = _costs(studies, quantized, reference, ids, batch_size=settings.batch_size, progress=progress)
        found = Analysis(
            about={},
            errors=tuple(block_errors(own, [short]) for own in studies),
            costs=tuple(costs),
            outliers=outliers(studies[-1], [short]),
            decay=decay(open_model, [short]),
            bounds=tuple(error_bound(system) for system in SYSTEMS),
            positions=position_errors(open_model, quantized, [long]),
        )
        about = _about(
            open_model,
            settings,
            recipes=[recipe.to_dict() for recipe in chosen.values()],
            calibration_tokens=sequences.numel(),
            evaluation_tokens=ids.numel(),
        )
    return replace(found, about=about | {"seconds": round(time.perf_counter() - start, 1)})


def _costs(
    studies: list[Study],
    quantized: Mapping[str, nn.Module],
    reference: CachedLogits,
    ids: Tensor,
    *,
    batch_size: int,
    progress: bool | None,
) -> list[Cost]:
    """Each recipe's tensors; one that an earlier recipe quantizes alike is not measured again."""
    found: list[Cost] = []
    for number, own in enumerate(studies):
        name = own.recipe.name
        known = {
            tensor: next((s for s in studies[:number] if quantized_alike(own, s, tensor)), None) for tensor in TENSORS
        }
        # y belongs to no recipe: once is enough.
        new = [tensor for tensor, earlier in known.items() if earlier is None]
        measured = tensor_costs(own, reference, ids, names=new, batch_size=batch_size, progress=progress)
        copied = [
            replace(old, recipe=name)
            for old in found
            if old.name != "y" and (same := known.get(old.name)) is not None and old.recipe == same.recipe.name
        ]
        found += sorted([*measured, *copied], key=lambda c: TENSORS.index(c.name))
        found.append(cost(quantized[name], reference, ids, recipe=name, name="all", batch_size=batch_size))
    return found


def _about(
    open_model: OpenModel,
    settings: Settings,
    *,
    recipes: list[dict[str, Any]],
    calibration_tokens: int,
    evaluation_tokens: int,
) -> dict[str, Any]:
    return {
        "model_type": model_type_of(open_model.model),
        "parameters": sum(p.numel() for p in open_model.model.parameters()),
        "dtype": str(open_model.adapter.dtype(open_model.model)).partition(".")[2],
        "mamba_layers": len(open_model.layers),
        "calibration_tokens": calibration_tokens,
        "evaluation_tokens": evaluation_tokens,
        "recipes": recipes,
        "settings": asdict(settings),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{open_model.device.type}: {_processor(open_model.device)}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "quamba": quamba.__version__,
        },
    }


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.processor()}, threads: {torch.get_num_threads()}"
