"""transformers' MambaForCausalLM and FalconMambaForCausalLM: the shell replaces the whole block."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from quamba.errors import UnsupportedModelError
from quamba.models.adapter import Adapter, register
from quamba.models.transformers_shell import TransformersShell, drop_ties
from quamba.nn.config import BlockConfig
from quamba.nn.ends import takes_norm


@register
class MambaAdapter(Adapter):
    """Mamba and Falcon-Mamba, which differ in the norms of d, B and C."""

    model_types = ("mamba", "falcon_mamba")
    shell = TransformersShell

    def layers(self, model: nn.Module) -> list[int]:
        return list(range(model.config.num_hidden_layers))  # type: ignore[union-attr,arg-type]

    def config(self, model: nn.Module, layer: int) -> BlockConfig:
        c: Any = model.config
        if c.hidden_act != "silu":
            raise UnsupportedModelError(f"found hidden_act {c.hidden_act!r}; expected 'silu'")
        falcon = c.model_type == "falcon_mamba"
        return BlockConfig(
            d_model=c.hidden_size,
            d_inner=c.intermediate_size,
            d_state=c.state_size,
            d_conv=c.conv_kernel,
            dt_rank=int(c.time_step_rank),
            norm_eps=c.layer_norm_epsilon,
            in_bias=c.use_bias,
            conv_bias=c.use_conv_bias,
            out_bias=c.use_bias,
            dbc_norm="weightless" if falcon else "none",
            dbc_eps=c.mixer_rms_eps if falcon else 0.0,
            residual=True,
            residual_in_fp32=c.residual_in_fp32,
            dtype=self.dtype(model),
        )

    def tensors(self, model: nn.Module, layer: int) -> dict[str, Tensor]:
        block: Any = model.get_submodule(self.module_name(layer))
        return {"norm.weight": block.norm.weight, **mixer_tensors(block.mixer)}

    def module_name(self, layer: int) -> str:
        return f"backbone.layers.{layer}"

    def embedding(self, model: nn.Module) -> str:
        return "backbone.embeddings"

    def head(self, model: nn.Module) -> str:
        return "lm_head"

    def final_norm(self, model: nn.Module) -> str:
        return "backbone.norm_f"

    def run_backbone(self, model: nn.Module, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        out: Tensor = model.backbone(input_ids, attention_mask=mask, use_cache=False)[0]  # type: ignore[operator]
        return out

    def tail(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        norm: Any = model.get_submodule(self.final_norm(model))
        head = model.get_submodule(self.head(model))
        dtype = head.weight.dtype

        def logits(stream: Tensor) -> Tensor:
            if takes_norm(head, stream):
                return head.normed(stream, norm.weight, norm.variance_epsilon)
            found: Tensor = head(norm(stream).to(dtype))
            return found.float()

        return logits

    def after_install(self, model: nn.Module) -> None:
        drop_ties(model)


def mixer_tensors(mixer: Any) -> dict[str, Tensor]:
    """A Mamba-1 mixer's tensors under our names; transformers and mamba-ssm name them alike."""
    found = {
        "in_proj.weight": mixer.in_proj.weight,
        "in_proj.bias": mixer.in_proj.bias,
        "conv.weight": mixer.conv1d.weight.squeeze(1),
        "conv.bias": mixer.conv1d.bias,
        "x_proj.weight": mixer.x_proj.weight,
        "dt_proj.weight": mixer.dt_proj.weight,
        "dt_bias": mixer.dt_proj.bias,
        "A_log": mixer.A_log,
        "D": mixer.D,
        "out_proj.weight": mixer.out_proj.weight,
        "out_proj.bias": mixer.out_proj.bias,
    }
    return {name: tensor for name, tensor in found.items() if tensor is not None}
