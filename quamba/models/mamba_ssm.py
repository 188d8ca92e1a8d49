"""mamba-ssm's MambaLMHeadModel with Mamba-1 layers: the shell replaces the whole Block."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quamba.errors import UnsupportedModelError
from quamba.models.adapter import Adapter, Shell, register
from quamba.models.transformers_mamba import mixer_tensors
from quamba.nn.config import BlockConfig, MixerState
from quamba.nn.ends import takes_norm


class MambaSsmShell(Shell):
    """Stands in for mamba_ssm's Block, which passes the residual stream beside the hidden states."""

    def forward(
        self,
        hidden_states: Tensor,
        residual: Tensor | None = None,
        inference_params: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Two (B, L, E) tensors whose sum is the residual stream, in and out."""
        stream = hidden_states if residual is None else residual + hidden_states
        if self.mixer.config.residual_in_fp32:
            stream = stream.to(torch.float32)
        state = self._state(inference_params, hidden_states)
        return self.mixer(stream, state=state), stream

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The state that mamba_ssm.utils.generation keeps for this layer: (B, D, K) and (B, D, N)."""
        state = self.mixer.new_state(batch_size, self._device())
        return state.conv, state.ssm

    def _device(self) -> torch.device:
        tensor: Tensor = next(iter(self.mixer.state_dict().values()))
        return tensor.device

    def _state(self, params: Any, hidden: Tensor) -> MixerState | None:
        if params is None:
            return None
        kept = params.key_value_memory_dict
        if self.layer not in kept:
            state = self.mixer.new_state(hidden.shape[0], hidden.device)
            kept[self.layer] = (state.conv, state.ssm)
        conv, ssm = kept[self.layer]
        if params.seqlen_offset == 0:
            conv.zero_()
            ssm.zero_()
        return MixerState(conv=conv, ssm=ssm)


@register
class MambaSsmAdapter(Adapter):
    """MambaLMHeadModel; its config names no model type (quamba.models.adapter.model_type_of)."""

    model_types = ("mamba_ssm",)
    shell = MambaSsmShell

    def layers(self, model: nn.Module) -> list[int]:
        return list(range(len(model.backbone.layers)))  # type: ignore[union-attr,arg-type]

    def config(self, model: nn.Module, layer: int) -> BlockConfig:
        block: Any = model.get_submodule(self.module_name(layer))
        if isinstance(block, Shell):
            return block.mixer.config
        mixer = block.mixer
        if not hasattr(mixer, "x_proj") or not hasattr(mixer, "dt_rank"):
            raise UnsupportedModelError(
                f"found a mixer {type(mixer).__name__} in layer {layer}; expected mamba_ssm's Mamba "
                "(ssm_cfg layer 'Mamba1')"
            )
        if getattr(block, "mlp", None) is not None:
            raise UnsupportedModelError(f"found an MLP in layer {layer}; expected blocks of norm and mixer alone")
        if type(block.norm).__name__ != "RMSNorm":
            raise UnsupportedModelError(f"found a norm {type(block.norm).__name__}; expected RMSNorm (rms_norm=True)")
        return BlockConfig(
            d_model=mixer.d_model,
            d_inner=mixer.d_inner,
            d_state=mixer.d_state,
            d_conv=mixer.d_conv,
            dt_rank=int(mixer.dt_rank),
            norm_eps=block.norm.eps,
            in_bias=mixer.in_proj.bias is not None,
            conv_bias=mixer.conv1d.bias is not None,
            out_bias=mixer.out_proj.bias is not None,
            dbc_norm="none",
            dbc_eps=0.0,
            residual=False,
            residual_in_fp32=bool(block.residual_in_fp32),
            dtype=mixer.in_proj.weight.dtype,
        )

    def tensors(self, model: nn.Module, layer: int) -> dict[str, Tensor]:
        block: Any = model.get_submodule(self.module_name(layer))
        return {"norm.weight": block.norm.weight, **mixer_tensors(block.mixer)}

    def module_name(self, layer: int) -> str:
        return f"backbone.layers.{layer}"

    def embedding(self, model: nn.Module) -> str:
        return "backbone.embedding"

    def head(self, model: nn.Module) -> str:
        return "lm_head"

    def final_norm(self, model: nn.Module) -> str:
        return "backbone.norm_f"

    def run_backbone(self, model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None and not bool(mask.to(torch.bool).all()):
            raise UnsupportedModelError(
                "found a batch with padding; mamba-ssm models take none: pass unpadded sequences"
            )
        out: Tensor = model.backbone(input_ids)  # type: ignore[operator]
        return out

    def tail(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        norm: Any = model.get_submodule(self.final_norm(model))
        head = model.get_submodule(self.head(model))
        # The fused norm reads the stream as it is, the plain one in the dtype of its weight.
        fused, weight = bool(getattr(model.backbone, "fused_add_norm", False)), norm.weight
        dtype: Any = weight.dtype

        def logits(stream: Tensor) -> Tensor:
            if takes_norm(head, stream):
                return head.normed(stream, weight, norm.eps)
            found: Tensor = head(norm(stream if fused else stream.to(dtype)))
            return found

        return logits

    def tied(self, model: nn.Module) -> bool:
        return bool(getattr(model.config, "tie_embeddings", False))

    def untie(self, model: nn.Module) -> None:
        config: Any = model.config
        config.tie_embeddings = False
