"""What is measured, against figures worked out by hand."""

import json
import time
from typing import Any

import pytest
import torch

from quamba.bench.building import quantize_blindly, random_model
from quamba.bench.kernels import kernel_times
from quamba.bench.measure import measure
from quamba.bench.peer import make_peer
from quamba.bench.shapes import SHAPES, find_shape
from quamba.bench.subjects import Quantized, Subject, block_operations
from quamba.bench.tables import tables
from quamba.bench.timing import Plan
from quamba.errors import RuntimeConfigError, UnsupportedModelError
from quamba.models import find_adapter
from tests.runtime.helpers import make
from tests.tiny import make_model

CPU = torch.device("cpu")


class Twice(Quantized):
    """A peer: the same model, each call made twice."""

    def decode(self, batch: int, mode: str) -> Any:
        call = super().decode(batch, mode)
        return lambda: (call(), call())


def measured(*subjects: Subject, **options: Any) -> Any:
    settings: dict[str, Any] = {"batches": (1, 2), "lengths": (5, 9), "new_tokens": (3,), "kernels": 3, **options}
    return measure(
        model="a model", dtype=torch.float32, subjects=subjects,
        plan=Plan(rounds=2, runs=4, warm_ups=1), **settings,
    )  # fmt: skip


def test_every_case_and_figure_is_there() -> None:
    model = make("mamba")
    ours, peer = Quantized("ours", model), Twice("peer", model)
    report = measured(ours, peer, reference="peer")
    found = json.loads(json.dumps(report.to_dict()))
    cases = [(f["subject"], *f["case"].values()) for f in found["figures"]]
    both = [("TTFT", "eager", 1, 5, 0), ("TTFT", "eager", 1, 9, 0), ("TPOT", "eager", 1, 0, 0)]
    both += [("TPOT", "eager", 2, 0, 0), ("TTLT", "eager", 1, 5, 3), ("TTLT", "eager", 1, 9, 3)]
    assert cases == [(name, *case) for case in both for name in ("ours", "peer")]
    decode = [f for f in report.figures if f.case.what == "TPOT"]
    for mine, other in zip(decode[::2], decode[1::2], strict=True):
        assert mine.speedup == pytest.approx(other.time.median / mine.time.median)
        assert other.speedup is None
        assert mine.time.runs == 8
    assert set(report.kernels) >= {"ours, TTFT eager, batch 1, prompt 5", "peer, TPOT eager, batch 2"}
    assert found["versions"]["torch"] == torch.__version__
    assert found["copy_bandwidth"] > 0
    assert found["modes"] == {"ours": "eager", "peer": "eager"}
    drawn = tables(report)
    # Six cases and three rows of memory; every figure.
    assert (drawn[0].row_count, drawn[2].row_count) == (9, 12)


def test_a_computed_time_is_compared_with_none() -> None:
    class Slow(Quantized):
        def decode(self, batch: int, mode: str) -> Any:
            return lambda: time.sleep(0.05)

    model = make("mamba")
    plan = Plan(rounds=1, runs=2, warm_ups=1, seconds=1.5)
    report = measure(
        model="", dtype=torch.float32, subjects=[Quantized("fast", model), Slow("slow", model)], reference="slow",
        batches=[1], lengths=[4], new_tokens=[2, 30], plan=plan, kernels=0,
    )  # fmt: skip
    measured = {
        (f.subject, f.case.what, f.case.new_tokens): (f.measured, f.speedup is not None) for f in report.figures
    }
    assert measured["fast", "TPOT", 0] == (True, True)
    assert measured["fast", "TTLT", 2] == (True, True)
    assert measured["slow", "TTLT", 30] == (False, False)
    assert measured["fast", "TTLT", 30] == (True, False)


def test_bytes_and_operations() -> None:
    model = make("mamba")
    report = measured(Quantized("ours", model), batches=(2,), lengths=(9,), new_tokens=(), kernels=0)
    prefill, step = report.figures
    E, D, N, R, K, V, layers = 24, 48, 5, 3, 4, 97, 3
    linears = 2 * D * E + (R + 2 * N) * D + D * R + E * D
    assert block_operations(find_adapter(model).config(make_model("mamba"), 0)) == 2 * linears
    assert prefill.operations == pytest.approx(2 * linears * layers * 9 / (1e-3 * prefill.time.median))
    state = 2 * layers * D * (K + 4 * N)
    assert Quantized("", model).state_bytes(2) == state
    weights = Quantized("", model).step_weight_bytes
    assert weights is not None
    int8 = layers * (linears + D * K) + V * E
    # And scales, norms, A, D and biases in float32.
    assert int8 < weights < int8 + 4 * layers * (2 * D * N + 30 * D + 10 * E) + 8 * V
    assert step.bandwidth == pytest.approx((weights + 2 * state) / (1e-3 * step.time.median))


def test_the_float_model_reads_its_parameters() -> None:
    model = make("mamba", "float")
    original = make_model("mamba")
    # Tied: the head's table is the embedding's.
    assert Quantized("float", model).step_weight_bytes == sum(
        tensor.nbytes
        for name, tensor in original.state_dict().items()
        if "norm_f" not in name and "lm_head" not in name
    )


def test_what_is_no_subject_raises() -> None:
    with pytest.raises(UnsupportedModelError, match="found a float model"):
        Quantized("", make_model("mamba"))
    with pytest.raises(UnsupportedModelError, match="found the recipe 'quamba-w4a4', which simulates"):
        Quantized("", make("mamba", "quamba-w4a4"))


def test_hybrids_have_no_bandwidth() -> None:
    report = measured(Quantized("ours", make("jamba")), new_tokens=())
    assert all(f.bandwidth is None and f.operations is None and f.speedup is None for f in report.figures)


def test_kernels() -> None:
    a = torch.randn(200, 200)
    found = kernel_times(lambda: (a @ a).exp(), CPU, most=1, calls=2)
    assert [kernel.name for kernel in found][-2:] == ["others", "all"]
    assert found[-1].milliseconds == pytest.approx(found[0].milliseconds + found[1].milliseconds)
    assert any(kernel.count == 1 for kernel in found)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_make_models(name: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = find_shape(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.model_type, **shape.settings))
    count = sum(parameter.numel() for parameter in model.parameters())
    published = {"mamba-130m": 0.13e9, "mamba-370m": 0.37e9, "mamba-790m": 0.79e9, "mamba-1.4b": 1.37e9}
    published |= {"mamba-2.8b": 2.77e9, "falcon-mamba-7b": 7.27e9}
    if name in published:
        assert count == pytest.approx(published[name], rel=0.02)


def test_an_unknown_shape_raises() -> None:
    with pytest.raises(RuntimeConfigError, match="found the shape 'mamba-9b'; expected one of mamba-130m"):
        find_shape("mamba-9b")


def test_random_weights() -> None:
    model = random_model(find_shape("tiny"), dtype=torch.bfloat16, device=CPU)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.isnan().any() for parameter in model.parameters())
    quantize_blindly(model, "quamba-c")
    logits = model(torch.arange(5)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0


def test_peers_that_are_not_there_raise() -> None:
    with pytest.raises(RuntimeConfigError, match="found --against 'vllm'; expected one of mamba-ssm"):
        make_peer("vllm", make("mamba"), dtype=torch.float32, device=CPU)
    for family in ("jamba", "falcon_mamba"):
        with pytest.raises(UnsupportedModelError, match="expected a plain Mamba model"):
            make_peer("mamba-ssm", make(family), dtype=torch.float32, device=CPU)
