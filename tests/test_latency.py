"""What `quamba compare` says of latencies."""

import torch

import quamba
from quamba.cli.latency import latency, latency_on
from tests.tiny import make_model


def test_only_a_gpu_is_timed() -> None:
    assert latency_on("cpu") is None
    assert latency_on("cuda:0") is (latency)


def test_a_quantized_model_is_timed_and_a_float_one_is_not() -> None:
    assert latency(make_model("mamba")) == {}
    found = latency(quamba.quantize(make_model("mamba"), [torch.arange(40)]))
    assert set(found) == {"TTFT", "TPOT"}
    assert 0 < found["TPOT"] < found["TTFT"]
