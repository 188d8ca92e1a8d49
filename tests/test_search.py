"""percentile="search": the clip that is chosen is the best of the candidates, by the divergence itself."""

import pytest
import torch
import torch.nn.functional as F

import quamba
from quamba import convert, search
from quamba.models import find_adapter
from quamba.nn.mixer import Mixer
from quamba.observers import make_observer
from quamba.recipe import QuantSpec
from quamba.transforms import Transforms
from tests.test_quantize import make_model, tokens


@torch.no_grad()
@pytest.mark.parametrize("recipe", ["quamba", "quamba-c"])
def test_the_last_layers_clip_is_the_best_candidate(recipe: str) -> None:
    ids = tokens(8, 60)
    original, model = make_model("mamba"), make_model("mamba")
    # A few large values, so that the clip matters.
    for each in (original, model):
        each.backbone.layers[1].mixer.conv1d.bias[:2] += 20.0
    expected = F.log_softmax(original(ids).logits, dim=-1)
    quamba.quantize(model, [ids], recipe, percentile="search")

    adapter = find_adapter(original)
    source = Mixer(adapter.config(original, 1), adapter.tensors(original, 1))
    target = adapter.shell_at(model, 1).mixer
    chosen = target.x_scale.clone()
    seen: list[torch.Tensor] = []
    source.observer = lambda site, value, mask: seen.append(value.flatten(0, 1)) if site == "x" else None
    hidden = original.backbone.layers[0](original.backbone.embeddings(ids))
    source(hidden)
    granularity = target.format.granularity("x")
    room = quamba.RECIPES[recipe].activations["x"].headroom

    def divergence() -> float:
        found = F.log_softmax(model(ids).logits, dim=-1)
        return float((expected.exp() * (expected - found)).sum(dim=-1).double().mean())

    best = divergence()
    for level in search.CANDIDATES:
        observer = make_observer(QuantSpec(granularity, "percentile", level))
        observer.update(seen[0])
        convert.refill_x(target, source, transforms=Transforms(), alpha=room * observer.alpha())
        assert best <= divergence() * (1 + 1e-3), level
    assert chosen.shape == target.x_scale.shape
