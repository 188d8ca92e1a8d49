"""Tiny quantized models, and graphs that run on a CPU: the same bookkeeping, with a plain call for a replay."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from quamba import quantize
from quamba.runtime.engine import Engine
from tests.tiny import make_model, token_ids

STACKS = ("mamba", "mamba-biased", "falcon_mamba")
RECIPES = ("quamba-c", "naive", "dynamic", "mamba-had", "float")


def make(family: str, recipe: str = "quamba-c", **options: Any) -> Any:
    """A quantized model."""
    return quantize(make_model(family, **options), [token_ids(8, 24, seed=5)], recipe)


class CallsForGraphs:
    """Graphs without CUDA: keeps the tensors of a capture, and the body, which a replay calls on them."""

    def __init__(self) -> None:
        self.kept: dict[Hashable, tuple[tuple[Tensor, ...], Callable[..., Tensor], Tensor]] = {}

    def __contains__(self, key: Hashable) -> bool:
        return key in self.kept

    @property
    def keys(self) -> list[Hashable]:
        return list(self.kept)

    def run(
        self,
        key: Hashable,
        inputs: Sequence[Tensor],
        *,
        body: Callable[..., Tensor],
        warm_up: Callable[..., object],
    ) -> Tensor:
        if key not in self.kept:
            static = tuple(tensor.clone() for tensor in inputs)
            warm_up(*static)
            self.kept[key] = static, body, torch.empty(0)
        static, body, out = self.kept[key]
        for target, tensor in zip(static, inputs, strict=True):
            assert target.shape == tensor.shape
            target.copy_(tensor)
        # As a graph does: the result lies where the last one lay.
        result = body(*static)
        out.resize_(result.shape).copy_(result)
        return out


def with_calls_for_graphs(engine: Engine) -> Engine:
    """The engine, as it would run on CUDA."""
    engine._decoding, engine._prefilling = CallsForGraphs(), CallsForGraphs()  # type: ignore[assignment]
    return engine
