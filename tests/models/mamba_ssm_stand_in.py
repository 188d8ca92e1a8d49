"""A stand-in for mamba-ssm with the same names, in plain PyTorch: what the adapter may rely on, and no more.

The names and call signatures are those of mamba_ssm 2.3: models.mixer_seq_simple, modules.block,
modules.mamba_simple and utils.generation.
"""

from collections import namedtuple
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CausalLMOutput = namedtuple("CausalLMOutput", ["logits"])


@dataclass
class MambaConfig:
    d_model: int = 24
    d_intermediate: int = 0
    n_layer: int = 3
    vocab_size: int = 97
    ssm_cfg: dict[str, Any] = field(default_factory=dict)
    rms_norm: bool = True
    residual_in_fp32: bool = True
    tie_embeddings: bool = True


@dataclass
class InferenceParams:
    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    key_value_memory_dict: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * (wide.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight.float()).to(x.dtype)


class Mamba(nn.Module):
    def __init__(
        self,
        d_model: int,
        d_state: int = 5,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int = 3,
        conv_bias: bool = True,
        bias: bool = False,
        layer_idx: int = 0,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.dt_rank = d_model, d_state, d_conv, dt_rank
        self.d_inner = expand * d_model
        self.layer_idx = layer_idx
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias)
        self.conv1d = nn.Conv1d(
            self.d_inner, self.d_inner, d_conv, groups=self.d_inner, padding=d_conv - 1, bias=conv_bias
        )
        self.x_proj = nn.Linear(self.d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, self.d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1).float().log().repeat(self.d_inner, 1))
        self.D = nn.Parameter(torch.ones(self.d_inner))
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias)

    def forward(self, hidden_states: Tensor, inference_params: InferenceParams | None = None) -> Tensor:
        assert inference_params is None, "the stand-in does not decode"
        length = hidden_states.shape[1]
        x, z = self.in_proj(hidden_states).chunk(2, dim=-1)
        x = F.silu(self.conv1d(x.mT)[..., :length]).mT
        dt, B, C = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt))
        state, rows = x.new_zeros(x.shape[0], self.d_inner, self.d_state), []
        for t in range(length):
            decay = torch.exp(-dt[:, t, :, None] * self.A_log.exp())
            state = decay * state + (dt[:, t] * x[:, t])[..., None] * B[:, t, None]
            rows.append((state * C[:, t, None]).sum(-1) + self.D * x[:, t])
        out: Tensor = self.out_proj(torch.stack(rows, 1) * F.silu(z))
        return out


class Mamba2(nn.Module):
    def __init__(self, d_model: int, **kwargs: Any) -> None:
        super().__init__()
        self.d_model = d_model
        self.in_proj = nn.Linear(d_model, 4 * d_model)


class Block(nn.Module):
    def __init__(self, config: MambaConfig, index: int) -> None:
        super().__init__()
        options = dict(config.ssm_cfg)
        mixer = {"Mamba1": Mamba, "Mamba2": Mamba2}[options.pop("layer", "Mamba1")]
        self.residual_in_fp32 = config.residual_in_fp32
        self.fused_add_norm = False
        self.norm = RMSNorm(config.d_model) if config.rms_norm else nn.LayerNorm(config.d_model)
        self.mixer = mixer(config.d_model, **options, layer_idx=index)
        self.mlp = nn.Linear(config.d_model, config.d_model) if config.d_intermediate else None

    def forward(
        self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None
    ) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        hidden_states = self.norm(residual.to(self.norm.weight.dtype))
        if self.residual_in_fp32:
            residual = residual.float()
        return self.mixer(hidden_states, inference_params=inference_params), residual


class MixerModel(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(Block(config, index) for index in range(config.n_layer))
        self.norm_f = RMSNorm(config.d_model)

    def forward(self, input_ids: Tensor, inference_params: Any = None) -> Tensor:
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=inference_params)
        out: Tensor = self.norm_f((hidden + residual).to(self.norm_f.weight.dtype))
        return out


class MambaLMHeadModel(nn.Module):
    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = MixerModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.backbone.embedding.weight

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: Any = None) -> dict[int, Any]:
        layers = enumerate(self.backbone.layers)
        return {i: layer.allocate_inference_cache(batch_size, max_seqlen, dtype=dtype) for i, layer in layers}

    def forward(
        self, input_ids: Tensor, position_ids: Any = None, inference_params: Any = None, num_last_tokens: int = 0
    ) -> Any:
        hidden = self.backbone(input_ids, inference_params=inference_params)
        if num_last_tokens > 0:
            hidden = hidden[:, -num_last_tokens:]
        return CausalLMOutput(logits=self.lm_head(hidden))


@torch.no_grad()
def decode(model: MambaLMHeadModel, input_ids: Tensor, new_tokens: int, *, allocate: bool = False) -> Tensor:
    """Greedy generation as in mamba_ssm.utils.generation.decode; `allocate` as where a CUDA graph is captured."""
    params = InferenceParams(max_seqlen=input_ids.shape[1] + new_tokens, max_batch_size=input_ids.shape[0])
    if allocate:
        params.key_value_memory_dict = model.allocate_inference_cache(input_ids.shape[0], params.max_seqlen)
        for conv, ssm in params.key_value_memory_dict.values():  # what a capture leaves behind
            conv.fill_(3)
            ssm.fill_(3)
    sequence = [input_ids]
    for _ in range(new_tokens):
        logits = model(sequence[-1], inference_params=params, num_last_tokens=1).logits
        params.seqlen_offset += sequence[-1].shape[1]
        sequence.append(logits.argmax(dim=-1))
    return torch.cat(sequence, dim=1)
