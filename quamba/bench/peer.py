"""mamba-ssm in float beside a quantized model: the same shape, random weights, its own step with a CUDA graph."""

from typing import Any

import torch
from torch import Tensor, nn

from quamba.bench.subjects import Call, Subject, block_operations, tensor_bytes
from quamba.errors import RuntimeConfigError, UnsupportedModelError
from quamba.models.adapter import find_adapter
from quamba.nn.config import BlockConfig

PEERS = ("mamba-ssm",)


def make_peer(name: str, model: nn.Module, *, dtype: torch.dtype, device: torch.device) -> Subject:
    """The peer of that name, of a model's shape.

    Raises:
        RuntimeConfigError: there is no such peer, or it cannot be imported.
        UnsupportedModelError: the peer has no models of that kind.
    """
    if name not in PEERS:
        raise RuntimeConfigError(f"found --against {name!r}; expected one of {', '.join(PEERS)}")
    adapter = find_adapter(model)
    layers = adapter.layers(model)
    config = adapter.shell_at(model, layers[0]).mixer.config
    if adapter.tail(model) is None or config.dbc_norm != "none":
        raise UnsupportedModelError(
            f"found a {type(model).__name__}; expected a plain Mamba model to compare with {name}"
        )
    embedding: Any = model.get_submodule(adapter.embedding(model))
    return MambaSsm(config, layers=len(layers), vocabulary=embedding.weight.shape[0], dtype=dtype, device=device)


class MambaSsm(Subject):
    """mamba_ssm.models.mixer_seq_simple.MambaLMHeadModel."""

    name = "mamba-ssm"

    def __init__(
        self, config: BlockConfig, *, layers: int, vocabulary: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        try:
            from mamba_ssm.models.config_mamba import MambaConfig
            from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel
            from mamba_ssm.utils.generation import InferenceParams
        except ImportError as error:
            raise RuntimeConfigError(
                f"found no usable mamba-ssm ({error}); install it: pip install quamba[mamba-ssm]"
            ) from error
        self._params: Any = InferenceParams
        self._config, self._layers, self._dtype = config, layers, dtype
        self.device, self.vocabulary = device, vocabulary
        self.modes = ("graph", "eager") if device.type == "cuda" else ("eager",)
        ssm = {"layer": "Mamba1", "d_state": config.d_state, "d_conv": config.d_conv, "dt_rank": config.dt_rank}
        settings = MambaConfig(
            d_model=config.d_model, n_layer=layers, vocab_size=vocabulary, ssm_cfg=ssm, rms_norm=True,
            residual_in_fp32=True, fused_add_norm=True, tie_embeddings=True,
        )  # fmt: skip
        with torch.no_grad():
            self.model: Any = MambaLMHeadModel(settings, device=device, dtype=dtype).eval()

    @torch.no_grad()
    def _logits(self, ids: Tensor, params: Any = None) -> Tensor:
        found: Tensor = self.model(ids, inference_params=params, num_last_tokens=1).logits
        return found

    def _prepared(self, batch: int, length: int) -> Any:
        params = self._params(max_seqlen=length, max_batch_size=batch)
        params.key_value_memory_dict = self.model.allocate_inference_cache(batch, length, self._dtype)
        return params

    def prefill(self, batch: int, length: int, mode: str) -> Call:
        ids, params = self.prompt(batch, length), self._prepared(batch, length)

        def run() -> Tensor:
            return self._logits(ids, params)

        return _captured(run) if mode == "graph" else run

    def decode(self, batch: int, mode: str) -> Call:
        tokens, params = self.prompt(batch, 1), self._prepared(batch, 8)
        # Past the prompt: the layers take their step.
        params.seqlen_offset = 1

        def run() -> Tensor:
            return self._logits(tokens, params)

        return _captured(run) if mode == "graph" else run

    def whole(self, batch: int, length: int, new_tokens: int) -> Call:
        ids, params = self.prompt(batch, length), self._prepared(batch, length + new_tokens)
        tokens = ids[:, :1].clone()

        def step() -> Tensor:
            return self._logits(tokens, params)

        params.seqlen_offset = 1
        decode = _captured(step) if "graph" in self.modes else step

        def run() -> None:
            params.seqlen_offset = 0
            tokens.copy_(self._logits(ids, params)[:, -1].argmax(dim=-1, keepdim=True))
            params.seqlen_offset = 1
            for _ in range(new_tokens - 1):
                tokens.copy_(decode()[:, -1].argmax(dim=-1, keepdim=True))

        return run

    @property
    def weight_bytes(self) -> int:
        return tensor_bytes(self.model)

    @property
    def checkpoint_bytes(self) -> int:
        return tensor_bytes(self.model)

    @property
    def step_weight_bytes(self) -> int | None:
        # The head is the embedding's table.
        return tensor_bytes(self.model)

    def state_bytes(self, batch: int) -> int:
        c, size = self._config, self._dtype.itemsize
        return batch * self._layers * c.d_inner * (c.d_conv + c.d_state) * size

    @property
    def token_operations(self) -> int | None:
        return self._layers * block_operations(self._config)


def _captured(run: Any) -> Any:
    """A call that replays the graph of another one and returns that graph's output."""
    aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()

    def replay() -> Any:
        # The graph reads the tensors that `run` holds: they live as long as this does.
        _ = run
        graph.replay()
        return out

    return replay
