"""transformers' `from_pretrained` for our checkpoints; importing this module registers the method "quamba"."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quamba.checkpoint.attaching import attach
from quamba.checkpoint.layout import (
    CONFIG,
    FORMAT_VERSION,
    QUANT_METHOD,
    parse_quantization_config,
    quantization_config,
)
from quamba.checkpoint.manifest import Manifest
from quamba.checkpoint.skeleton import Skeleton, to_skeleton
from quamba.errors import CheckpointError
from quamba.quantization import Quantization


@register_quantization_config(QUANT_METHOD)
class QuambaConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json, in the form that transformers passes around."""

    quant_method: Any

    def __init__(self, quantization: Quantization) -> None:
        self.quant_method = QUANT_METHOD
        self.format_version = FORMAT_VERSION
        self.quantization = quantization

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return quantization_config(self.quantization)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Inverse of `to_dict`. Raises CheckpointError on anything unknown, missing or malformed."""
        config = cls(parse_quantization_config(config_dict, CONFIG))
        return (config, kwargs) if return_unused_kwargs else config


@register_quantizer(QUANT_METHOD)
class QuambaQuantizer(HfQuantizer):
    """Verifies the files, swaps the modules on meta, and finishes the model once transformers has filled it."""

    requires_calibration = True
    quantization_config: QuambaConfig
    skeleton: Skeleton | None = None

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(
                "found no checkpoint files; expected from_pretrained with the directory of a checkpoint"
            )
        manifest = Manifest.read(Path(checkpoint_files[0]).parent)
        if set(manifest.files) != set(map(Path, checkpoint_files)):
            raise CheckpointError(
                f"found {sorted(checkpoint_files)} to load; expected {sorted(map(str, manifest.files))}; "
                "load without variant or use_safetensors=False"
            )
        skeleton = to_skeleton(model, self.quantization_config.quantization.recipe)
        manifest.check(skeleton.expected(manifest.dtype))
        for _ in manifest.tensors():
            pass  # Read for the checks alone: transformers reads the files again.
        # transformers ties parameters by this map, and warns of tensors that the model has no place for.
        model.all_tied_weights_keys = dict(skeleton.ties)
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            skeleton.guard.replace(".", r"\."),
        }
        self.skeleton = skeleton

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        assert self.skeleton is not None
        self.skeleton.finish()
        # The skeleton refers to the model, which refers to this object: a copy of the model would hold two.
        self.skeleton = None
        attach(model, self.quantization_config.quantization)

    def is_serializable(self) -> bool:
        """True: see quamba.checkpoint.save."""
        return True

    @property
    def is_trainable(self) -> bool:
        """False: integers have no gradients."""
        return False


def adopt(model: PreTrainedModel, quantization: Quantization) -> None:
    """Set in a transformers model what `from_pretrained` sets in a quantized one."""
    config = QuambaConfig(quantization)
    attributes: Any = model
    attributes.config.quantization_config = config
    attributes.hf_quantizer = QuambaQuantizer(config, pre_quantized=True)
    attributes.is_quantized = True
    attributes.quantization_method = QUANT_METHOD
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = True
