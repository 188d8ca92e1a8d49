"""transformers' JambaForCausalLM: the shell replaces the Mamba mixer and absorbs the norm before it.

The residual addition stays in transformers' layer, so that its outputs (hidden states, router logits) are recorded
as before. Attention, MLPs and experts stay in float.
"""

from typing import Any

import torch
from torch import Tensor, nn

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.models.adapter import Adapter, register
from quamba.models.transformers_mamba import mixer_tensors
from quamba.models.transformers_shell import TransformersShell, drop_ties
from quamba.nn.config import BlockConfig


@register
class JambaAdapter(Adapter):
    """Jamba: Mamba layers among attention layers, MLPs and experts."""

    model_types = ("jamba",)
    shell = TransformersShell

    def layers(self, model: nn.Module) -> list[int]:
        return [i for i, kind in enumerate(model.config.layers_block_type) if kind == "mamba"]  # type: ignore[union-attr,arg-type]

    def config(self, model: nn.Module, layer: int) -> BlockConfig:
        c: Any = model.config
        if c.hidden_act != "silu":
            raise UnsupportedModelError(f"found hidden_act {c.hidden_act!r}; expected 'silu'")
        return BlockConfig(
            d_model=c.hidden_size,
            d_inner=c.mamba_expand * c.hidden_size,
            d_state=c.mamba_d_state,
            d_conv=c.mamba_d_conv,
            dt_rank=int(c.mamba_dt_rank),
            norm_eps=c.rms_norm_eps,
            in_bias=c.mamba_proj_bias,
            conv_bias=c.mamba_conv_bias,
            out_bias=c.mamba_proj_bias,
            dbc_norm="learned",
            dbc_eps=c.rms_norm_eps,
            residual=False,
            residual_in_fp32=False,
            dtype=self.dtype(model),
        )

    def tensors(self, model: nn.Module, layer: int) -> dict[str, Tensor]:
        mixer: Any = model.get_submodule(self.module_name(layer))
        norm: Any = model.get_submodule(self.absorbed(layer)[0])
        return {
            "norm.weight": norm.weight,
            "d_norm.weight": mixer.dt_layernorm.weight,
            "B_norm.weight": mixer.b_layernorm.weight,
            "C_norm.weight": mixer.c_layernorm.weight,
            **mixer_tensors(mixer),
        }

    def module_name(self, layer: int) -> str:
        return f"model.layers.{layer}.mamba"

    def absorbed(self, layer: int) -> list[str]:
        return [f"model.layers.{layer}.input_layernorm"]

    def embedding(self, model: nn.Module) -> str:
        return "model.embed_tokens"

    def head(self, model: nn.Module) -> str:
        return "lm_head"

    def final_norm(self, model: nn.Module) -> str:
        return "model.final_layernorm"

    def run_backbone(self, model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = model.model(input_ids, attention_mask=mask, use_cache=False)[0]  # type: ignore[operator]
        return out

    def kept_float(self, model: nn.Module) -> dict[str, str]:
        kept = super().kept_float(model)
        for i, kind in enumerate(model.config.layers_block_type):  # type: ignore[union-attr,arg-type]
            if kind != "mamba":
                kept[f"model.layers.{i}.input_layernorm"] = "the norm before attention, which stays in float"
                kept[f"model.layers.{i}.self_attn"] = "attention stays in float"
            kept[f"model.layers.{i}.pre_ff_layernorm"] = "the norm before the feed-forward part, which stays in float"
            kept[f"model.layers.{i}.feed_forward"] = "MLP and experts stay in float"
        return kept

    def after_install(self, model: nn.Module) -> None:
        drop_ties(model)

    @torch.no_grad()
    def rotate_rest(self, model: nn.Module) -> None:
        for i, kind in enumerate(model.config.layers_block_type):  # type: ignore[union-attr,arg-type]
            layer: Any = model.get_submodule(f"model.layers.{i}")
            if kind != "mamba":
                attention = layer.self_attn
                _rotate_inputs(layer.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj])
                _rotate_rows(attention.o_proj.weight)
            feed_forward = layer.feed_forward
            if hasattr(feed_forward, "experts"):
                experts = feed_forward.experts
                _rotate_inputs(layer.pre_ff_layernorm, [feed_forward.router], [experts.gate_up_proj])
                for expert in experts.down_proj:
                    _rotate_rows(expert)
            else:
                _rotate_inputs(layer.pre_ff_layernorm, [feed_forward.gate_proj, feed_forward.up_proj])
                _rotate_rows(feed_forward.down_proj.weight)


def _rotate_inputs(norm: Any, linears: list[Any], tensors: list[Tensor] | None = None) -> None:
    """Fold the norm's weight and the rotation into the columns of the weights that read it."""
    gamma = norm.weight.to(torch.float32)
    for weight in [*(linear.weight for linear in linears), *(tensors or [])]:
        if weight.shape[-1] != gamma.shape[0]:
            raise UnsupportedModelError(
                f"found a weight of shape {tuple(weight.shape)}; expected (..., {gamma.shape[0]})"
            )
        weight.copy_(ops.hadamard(weight.to(torch.float32) * gamma))
    norm.weight.fill_(1.0)


def _rotate_rows(weight: Tensor) -> None:
    """Rotate the outputs (N, K) of a weight that writes to the residual stream."""
    weight.copy_(ops.hadamard(weight.to(torch.float32).T.contiguous()).T)
