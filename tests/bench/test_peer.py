"""mamba-ssm as a peer, with the stand-in for the package."""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from quamba.bench.measure import measure
from quamba.bench.peer import make_peer
from quamba.bench.subjects import Quantized
from quamba.bench.timing import Plan
from quamba.errors import RuntimeConfigError
from tests.models import mamba_ssm_stand_in as stand_in
from tests.runtime.helpers import make


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The stand-in under the package's names; what its model was made with, and how it was called."""
    seen: list[dict[str, Any]] = []

    class Model(stand_in.MambaLMHeadModel):
        def __init__(self, config: Any, device: Any, dtype: Any) -> None:
            seen.append(vars(config))
            settings = {key: value for key, value in vars(config).items() if key != "fused_add_norm"}
            super().__init__(stand_in.MambaConfig(**settings))

        def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> dict[int, Any]:
            return {0: (torch.zeros(batch_size), torch.zeros(batch_size))}

        def forward(self, input_ids: Any, inference_params: Any = None, num_last_tokens: int = 0) -> Any:
            seen.append({"shape": tuple(input_ids.shape), "offset": inference_params.seqlen_offset})
            return super().forward(input_ids, num_last_tokens=num_last_tokens)

    class Config:
        def __init__(self, **settings: Any) -> None:
            vars(self).update(settings)

    names = {
        "mamba_ssm": {},
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"MambaConfig": Config},
        "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": Model},
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": {"InferenceParams": stand_in.InferenceParams},
    }
    for name, content in names.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_it_has_our_shape_and_takes_its_step(package: list[dict[str, Any]]) -> None:
    model = make("mamba")
    ours = Quantized("quamba", model)
    peer = make_peer("mamba-ssm", model, dtype=torch.float32, device=torch.device("cpu"))
    made = package.pop(0)
    assert (made["d_model"], made["n_layer"], made["vocab_size"]) == (24, 3, 97)
    assert made["ssm_cfg"] == {"layer": "Mamba1", "d_state": 5, "d_conv": 4, "dt_rank": 3}
    assert peer.token_operations == ours.token_operations
    assert peer.state_bytes(2) == 2 * 3 * 48 * (4 + 5) * 4
    assert torch.equal(peer.prompt(2, 5), ours.prompt(2, 5))
    report = measure(
        model="m", dtype=torch.float32, subjects=[ours, peer], batches=[1, 2], lengths=[6], new_tokens=[4],
        reference="mamba-ssm", plan=Plan(1, 1, 1), kernels=0,
    )  # fmt: skip
    assert [figure.subject for figure in report.figures] == ["quamba", "mamba-ssm"] * 4
    assert {(call["shape"], call["offset"]) for call in package} == {((1, 6), 0), ((2, 1), 1), ((1, 1), 1)}
    whole = package[-4:]
    assert [call["offset"] for call in whole] == [0, 1, 1, 1]


def test_without_the_package_it_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mamba_ssm", None)
    with pytest.raises(RuntimeConfigError, match="found no usable mamba-ssm"):
        make_peer("mamba-ssm", make("mamba"), dtype=torch.float32, device=torch.device("cpu"))
