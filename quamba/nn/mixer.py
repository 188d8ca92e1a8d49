"""The float mixer: the whole block in plain arithmetic, with its quantization sites named.

It runs calibration (an observer sees every site), layers that are kept in float, and the tests of exactness.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba import ops
from quamba.errors import UnsupportedModelError
from quamba.nn.config import BlockConfig, MixerState, traceable
from quamba.nn.named import assign, lookup
from quamba.transforms import Transforms

Observer = Callable[[str, Tensor, Tensor | None], None]


class Mixer(nn.Module):
    """norm -> in_proj -> conv + SiLU -> x_proj -> dt_proj -> selective scan + gate -> out_proj (+ residual).

    Attributes:
        config: the block's shape.
        transforms: the coordinates in which the sites are observed (quamba.transforms).
        folded: True where the weights hold the transforms already, so that the data must follow them.
        observer: called as observer(site, value, mask) at each site, or None.
    """

    def __init__(
        self,
        config: BlockConfig,
        tensors: Mapping[str, Tensor],
        *,
        transforms: Transforms | None = None,
        folded: bool = False,
    ) -> None:
        """Hold the given tensors (not copies) under the names of `config.tensor_shapes()`.

        Raises:
            UnsupportedModelError: a tensor is missing, surplus or of the wrong shape.
        """
        super().__init__()
        self.config = config
        self.transforms = transforms or Transforms()
        self.folded = folded
        self.observer: Observer | None = None
        shapes = config.tensor_shapes()
        if set(tensors) != set(shapes):
            raise UnsupportedModelError(
                f"found the tensors {sorted(tensors)} in a block; expected exactly {sorted(shapes)}"
            )
        for name, shape in shapes.items():
            if tuple(tensors[name].shape) != shape:
                raise UnsupportedModelError(
                    f"found {name} of shape {tuple(tensors[name].shape)}; expected {shape} from the model's config"
                )
            assign(self, name, nn.Parameter(tensors[name].detach(), requires_grad=False))
        self.eval()

    @classmethod
    def empty(cls, config: BlockConfig, device: torch.device | str = "meta") -> "Mixer":
        """A mixer whose tensors are yet to be filled."""
        shapes = config.tensor_shapes()
        return cls(
            config, {name: torch.empty(shape, dtype=config.dtype, device=device) for name, shape in shapes.items()}
        )

    def tensors(self) -> dict[str, Tensor]:
        """The block's tensors under the names of `config.tensor_shapes()`."""
        return {name: lookup(self, name) for name in self.config.tensor_shapes()}

    def state_dtype(self) -> torch.dtype:
        """The dtype of the convolution's state."""
        return self.config.dtype

    def new_state(self, batch: int, device: torch.device) -> MixerState:
        """A zero state for that many sequences."""
        return self.config.new_state(batch, device, conv_dtype=self.state_dtype())

    def _see(self, site: str, value: Tensor, mask: Tensor | None) -> Tensor:
        """What goes on from a site; here the value itself."""
        if self.observer is not None:
            self.observer(site, value, mask)
        return value

    def _norm(self, value: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        return F.rms_norm(wide, wide.shape[-1:], None if weight is None else weight.to(wide.dtype), eps)

    def forward(self, hidden: Tensor, *, mask: Tensor | None = None, state: MixerState | None = None) -> Tensor:
        """Run the block.

        Args:
            hidden: (B, L, E) any float dtype.
            mask: (B, L), 0 at padding, or None.
            state: left context, updated in place; None for a zero start whose end is not kept.

        Returns:
            (B, L, E): h + mixer(norm(h)) where the block owns the residual, else mixer(norm(h)).
        """
        c, t, w = self.config, self.transforms, self.tensors()
        state = traceable(self, state, hidden)
        u = self._norm(hidden, w["norm.weight"], c.norm_eps).to(c.dtype)
        if self.folded:
            u = self._see("u", u, mask)
        elif self.observer is not None:
            self._see("u", t.to_u(u, self._norm(hidden, None, c.norm_eps)), mask)
        x0, z = F.linear(u, w["in_proj.weight"], w.get("in_proj.bias")).chunk(2, dim=-1)
        x0, z = self._see("x0", x0, mask), self._see("z", z, mask)
        x = ops.causal_conv1d(
            x0,
            None,
            w["conv.weight"],
            None,
            w.get("conv.bias"),
            None,
            c.dtype,
            mask,
            None if state is None else state.conv,
        )
        seen = self.folded or self.observer is not None
        x_seen = self._see("x", t.to_x(x) if seen else x, mask)
        dbc = F.linear(x_seen if self.folded else x, w["x_proj.weight"])
        if self.folded:
            x = t.from_x(x_seen)
        d, B, C = torch.split(dbc, [c.dt_rank, c.d_state, c.d_state], dim=-1)
        if c.dbc_norm != "none":
            d, B, C = (
                self._norm(v, w.get(f"{n}_norm.weight"), c.dbc_eps).to(c.dtype)
                for v, n in ((d, "d"), (B, "B"), (C, "C"))
            )
        d, B, C = self._see("d", d, mask), self._see("B", B, mask), self._see("C", C, mask)
        dt = self._see("dt", F.linear(d, w["dt_proj.weight"]), mask)
        A = -torch.exp(w["A_log"].to(torch.promote_types(c.dtype, torch.float32)))
        g = ops.selective_scan(
            x, None, dt, None, w["dt_bias"], A, B, None, C, None, w["D"], z, None, None, c.dtype,
            None if state is None else state.ssm,
        )  # fmt: skip
        g_seen = self._see("g", t.to_g(g) if seen else g, mask)
        out = F.linear(g_seen if self.folded else g, w["out_proj.weight"], w.get("out_proj.bias"))
        if not c.residual:
            return out
        return (hidden.to(torch.float32) if c.residual_in_fp32 and c.dtype != torch.float64 else hidden) + out
