"""The simulated mixer: a float one that rounds its sites as if they were stored in fewer bits than the ops have."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from quamba import numerics
from quamba.nn.config import BlockConfig, MixerState
from quamba.nn.mixer import Mixer
from quamba.recipe import BlockFormat
from quamba.transforms import Transforms


class SimulatedMixer(Mixer):
    """The float mixer over rounded weights, with every site rounded on its way; in float32, whatever the model's dtype.

    It tells what a format costs in accuracy, and nothing about memory or speed. It cannot be saved.

    Attributes:
        format: which sites are rounded, and to how many bits.
    """

    g_divisor: Tensor

    def __init__(
        self,
        config: BlockConfig,
        tensors: Mapping[str, Tensor],
        *,
        format: BlockFormat,
        transforms: Transforms,
        scales: Mapping[str, Tensor],
    ) -> None:
        """Hold tensors that are folded and rounded already, and the scales of the static sites.

        Args:
            config: the block's shape.
            tensors: float32, under the names of `config.tensor_shapes()`.
            format: see the class.
            transforms: folded into the tensors.
            scales: site -> float32 scale for the format's bits.
        """
        super().__init__(replace(config, dtype=torch.float32), tensors, transforms=transforms, folded=True)
        self.format = format
        for site, scale in scales.items():
            self.register_buffer(f"{site}_scale", scale)
        if transforms.g_divisor is not None:
            self.register_buffer("g_divisor", transforms.g_divisor)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SimulatedMixer":
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.transforms.g_divisor is not None:
            self.transforms = replace(self.transforms, g_divisor=self.g_divisor)
        return self

    def _see(self, site: str, value: Tensor, mask: Tensor | None) -> Tensor:
        value = super()._see(site, value, mask)
        spec = self.format.activations[site]
        if spec is None:
            return value
        static = spec.granularity != "token"
        scale = getattr(self, f"{site}_scale") if static else numerics.token_scale(value, bits=spec.bits)
        return numerics.simulate(value, scale, bits=spec.bits)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        """Run the block; as `Mixer.forward`."""
        keeps_wide = self.config.residual and self.config.residual_in_fp32
        out = super().forward(hidden, mask=mask, state=state)
        return out if keeps_wide else out.to(hidden.dtype)
