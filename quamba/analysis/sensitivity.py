"""What each tensor costs on its own: quantize one, leave everything else in float.

What "one quantized" means is in quamba.analysis.single.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from quamba.analysis.single import BLOCK_TENSORS, TENSORS, single_tensor_end, single_tensor_mixer
from quamba.analysis.study import OpenModel, Study, replaced
from quamba.analysis.tap import Scan, ScanTap
from quamba.data import Batch, batches
from quamba.errors import RecipeError
from quamba.eval.perplexity import CachedLogits, compare
from quamba.progress import track
from quamba.recipe import MODEL_ADDRESSES


@dataclass(frozen=True, eq=False)
class BlockErrors:
    """The error that one quantized tensor makes in its own block, on the float model's input to that block.

    Squares are summed over sequences and channels, so that a time step's normalised mean squared error is noise over
    signal there, and sums over steps give that of the whole.

    Attributes:
        recipe: its name.
        names: S tensors of a block.
        layers: P layer numbers.
        y_noise, out_noise: float64 (S, P, L), squared error of the scan's output y and of the mixer's output
            (without the residual); NaN where the recipe keeps the tensor in float.
        y_signal, out_signal: float64 (P, L), squares of the float values.
    """

    recipe: str
    names: tuple[str, ...]
    layers: tuple[int, ...]
    y_noise: Tensor
    out_noise: Tensor
    y_signal: Tensor
    out_signal: Tensor

    def nmse(self, at: str) -> Tensor:
        """float64 (S, P): normalised mean squared error at "y" or at "out"."""
        noise, signal = self._at(at)
        return noise.sum(dim=-1) / signal.sum(dim=-1)

    def nmse_over_time(self, at: str) -> Tensor:
        """float64 (S, P, L): the same for each time step."""
        noise, signal = self._at(at)
        return noise / signal

    def _at(self, at: str) -> tuple[Tensor, Tensor]:
        if at not in ("y", "out"):
            raise RecipeError(f"found {at!r}; expected 'y' or 'out'")
        return (self.y_noise, self.y_signal) if at == "y" else (self.out_noise, self.out_signal)


@dataclass(frozen=True)
class Cost:
    """What quantizing something in all layers does to the model's predictions.

    Attributes:
        recipe: whose spec it was quantized with.
        name: a tensor of TENSORS, or "all" for the whole recipe.
        increase_percent: of the perplexity over the float model's.
        stderr_percent: standard error of that, from the paired differences of the windows.
        kl: mean KL divergence of the next-token distribution from the float model's, in nats.
        tokens: how many were scored.
    """

    recipe: str
    name: str
    increase_percent: float
    stderr_percent: float
    kl: float
    tokens: int


@torch.no_grad()
def block_errors(study: Study, data: Iterable[Any], *, names: Sequence[str] = BLOCK_TENSORS) -> BlockErrors:
    """Measure each tensor's error in each block.

    Args:
        study: of a recipe.
        data: sequences of one length L, as for `quamba.quantize`.
        names: which tensors.

    Raises:
        RecipeError: a name is not in BLOCK_TENSORS.
        CalibrationError: the data is malformed.
    """
    _known(names, BLOCK_TENSORS)
    opened = study.opened
    sums: dict[int, list[Tensor]] = {}

    def measure(layer: int, hidden: Tensor) -> None:
        reference_y, reference_out = _run(opened.mixers[layer], hidden, residual=_owns_residual(opened, layer))
        found = [_energy(reference_y), _energy(reference_out)]
        y_rows, out_rows = [], []
        for name in names:
            mixer = single_tensor_mixer(study, layer, name)
            if mixer is None:
                y_rows.append(torch.full_like(found[0], torch.nan))
                out_rows.append(torch.full_like(found[0], torch.nan))
                continue
            y, out = _run(mixer, hidden, residual=_owns_residual(opened, layer))
            # With smoothing, the scan works on x over the divisor, and y is linear in x.
            divisor = getattr(mixer, "g_divisor", None)
            y_rows.append(_energy((y if divisor is None else y * divisor) - reference_y))
            out_rows.append(_energy(out - reference_out))
        new = [torch.stack(y_rows), torch.stack(out_rows), *found]
        sums[layer] = [a + b for a, b in zip(sums[layer], new, strict=True)] if layer in sums else new

    def watch(layer: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            measure(layer, args[0])

        return opened.mixers[layer].register_forward_pre_hook(hook)

    handles = [watch(layer) for layer in opened.layers]
    try:
        for batch in batches(data, samples=None, device=opened.device):
            _unpadded(batch)
            opened.adapter.run_backbone(opened.model, batch.input_ids, None)
    finally:
        for handle in handles:
            handle.remove()
    y_noise, out_noise, y_signal, out_signal = (
        torch.stack([sums[layer][part] for layer in opened.layers]) for part in range(4)
    )
    return BlockErrors(
        recipe=study.recipe.name,
        names=tuple(names),
        layers=opened.layers,
        y_noise=y_noise.transpose(0, 1).contiguous(),
        out_noise=out_noise.transpose(0, 1).contiguous(),
        y_signal=y_signal,
        out_signal=out_signal,
    )


@torch.no_grad()
def tensor_costs(
    study: Study,
    reference: CachedLogits,
    input_ids: Tensor,
    *,
    names: Sequence[str] = TENSORS,
    batch_size: int = 8,
    progress: bool | None = None,
) -> list[Cost]:
    """Perplexity and KL with one tensor quantized, in all layers at once where it is one of a block.

    Args:
        study: of a recipe; tensors that it keeps in float everywhere are left out of the result.
        reference: the float model's logits over the same ids (`quamba.eval.perplexity.cache_logits`).
        input_ids: int64 (T,).
        names: which tensors.
        batch_size: windows per forward pass.
        progress: show a progress bar; None shows it on a terminal.

    Raises:
        RecipeError: a name is not in TENSORS.
        QuambaError: the ids do not fit the reference.
    """
    _known(names, TENSORS)
    found = []
    for name in track(list(names), f"one tensor of {study.recipe.name}", show=progress):
        mixers: dict[int, nn.Module] = {}
        ends: dict[str, nn.Module] = {}
        if name in MODEL_ADDRESSES:
            ends = single_tensor_end(study, name)
        else:
            made = ((layer, single_tensor_mixer(study, layer, name)) for layer in study.opened.layers)
            mixers = {layer: mixer for layer, mixer in made if mixer is not None}
        if not mixers and not ends:
            continue
        with replaced(study.opened, mixers, ends):
            found.append(
                cost(
                    study.opened.model, reference, input_ids, recipe=study.recipe.name, name=name, batch_size=batch_size
                )
            )
    return found


def cost(
    model: nn.Module, reference: CachedLogits, input_ids: Tensor, *, recipe: str, name: str, batch_size: int = 8
) -> Cost:
    """A model beside the float model's logits, as a Cost of that name. Raises as `quamba.eval.compare` does."""
    result = compare(
        model, reference, input_ids, context=reference.context, stride=reference.stride, batch_size=batch_size,
        progress=False,
    )  # fmt: skip
    return Cost(
        recipe=recipe,
        name=name,
        increase_percent=100 * (result.model.perplexity / result.reference.perplexity - 1),
        stderr_percent=100 * result.nll_difference_stderr,
        kl=result.kl,
        tokens=result.model.tokens,
    )


def _owns_residual(opened: OpenModel, layer: int) -> bool:
    return opened.mixers[layer].config.residual


def _run(mixer: nn.Module, hidden: Tensor, *, residual: bool) -> tuple[Tensor, Tensor]:
    """(B, L, D) y and (B, L, E) the mixer's output without the residual, both float32."""
    seen: list[Scan] = []
    # A mixer with a quantized y has a tap of its own, inside which this one would see y before it is quantized.
    with ScanTap(seen.append, y_scale=getattr(mixer, "y_scale", None)):
        out = getattr(mixer, "inner", mixer).forward(hidden)
    return seen[0].y, (out - hidden if residual else out).to(torch.float32)


def _energy(value: Tensor) -> Tensor:
    """(B, L, D) -> float64 (L,): squares summed over sequences and channels."""
    return value.to(torch.float64).square().sum(dim=(0, 2)).cpu()


def _unpadded(batch: Batch) -> None:
    if batch.mask is not None:
        raise RecipeError("found padded sequences; expected rows of one length: errors are told by time step")


def _known(names: Sequence[str], known: Sequence[str]) -> None:
    if not set(names) <= set(known):
        raise RecipeError(f"found the tensors {sorted(set(names) - set(known))}; expected some of {tuple(known)}")
