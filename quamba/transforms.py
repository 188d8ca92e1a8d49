"""Changes of coordinates that leave the float function as it is: what the sites see, and the weights that match.

Each step moves a factor or a rotation from an activation into the weights that read or write it:

    smooth_input     u -> u / s, with s into the norm's weight and the columns of in_proj (SmoothQuant, eq. 3)
    smooth_output    g -> g / s, with s into x's scale in the scan (g is linear in x) and the columns of out_proj
    smooth_head      the head's input -> itself / s, with s into the columns of the head; where the embedding is tied to
                     it, look-ups take s out again
    rotate_output    g -> H g, with H^T into out_proj (design, section 1.2)
    rotate_x         x -> H x before x_proj, and back before the scan
    rotate_residual  h -> H h for the whole residual stream; the norm's weight goes into in_proj first
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quamba import ops
from quamba.errors import RecipeError


@dataclass(frozen=True)
class Transforms:
    """The coordinates of one block's sites.

    Attributes:
        u_divisor: (E,) or None; u is divided by it.
        rotate_u: u, without the norm's weight, is rotated, as is the block's output; not with u_divisor.
        rotate_x: x is rotated for x_proj.
        g_divisor: (D,) or None; g is divided by it.
        rotate_g: g is rotated (after the division).
    """

    u_divisor: Tensor | None = None
    rotate_u: bool = False
    rotate_x: bool = False
    g_divisor: Tensor | None = None
    rotate_g: bool = False

    def __post_init__(self) -> None:
        if self.rotate_u and self.u_divisor is not None:
            raise RecipeError("found smooth_input with rotate_residual; expected one of them: rotation mixes channels")

    def to_u(self, u: Tensor, weightless: Tensor) -> Tensor:
        """(..., E) -> (..., E): u in the site's coordinates, from u and from u without the norm's weight."""
        return ops.hadamard(weightless) if self.rotate_u else _divide(u, self.u_divisor)

    def to_x(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): x in the site's coordinates."""
        return _turn(x, self.rotate_x)

    def from_x(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D): the inverse of `to_x`."""
        return ops.hadamard_inverse(x) if self.rotate_x else x

    def to_g(self, g: Tensor) -> Tensor:
        """(..., D) -> (..., D): g in the site's coordinates."""
        return _turn(_divide(g, self.g_divisor), self.rotate_g)


def _divide(value: Tensor, divisor: Tensor | None) -> Tensor:
    return value if divisor is None else value / divisor.to(torch.promote_types(value.dtype, torch.float32))


def _turn(value: Tensor, rotate: bool) -> Tensor:
    return ops.hadamard(value) if rotate else value


def fold(tensors: Mapping[str, Tensor], transforms: Transforms) -> dict[str, Tensor]:
    """The block's tensors for the transformed coordinates, in float32 (float64 for float64) where they change.

    Args:
        tensors: under the names of `BlockConfig.tensor_shapes()`.
        transforms: the coordinates.

    Returns:
        The same names; tensors that do not change are the ones given.
    """
    out = dict(tensors)

    def wide(name: str) -> Tensor:
        return out[name].to(torch.promote_types(out[name].dtype, torch.float32))

    if transforms.u_divisor is not None:
        divisor = transforms.u_divisor
        out["norm.weight"] = wide("norm.weight") / divisor
        out["in_proj.weight"] = wide("in_proj.weight") * divisor
    if transforms.rotate_u:
        out["in_proj.weight"] = ops.hadamard(wide("in_proj.weight") * wide("norm.weight"))
        out["norm.weight"] = torch.ones_like(out["norm.weight"])
        out["out_proj.weight"] = ops.hadamard(wide("out_proj.weight").T.contiguous()).T.contiguous()
        if "out_proj.bias" in out:
            out["out_proj.bias"] = ops.hadamard(wide("out_proj.bias"))
    if transforms.rotate_x:
        out["x_proj.weight"] = ops.hadamard(wide("x_proj.weight"))
    if transforms.g_divisor is not None:
        out["out_proj.weight"] = wide("out_proj.weight") * transforms.g_divisor
    if transforms.rotate_g:
        out["out_proj.weight"] = ops.hadamard(wide("out_proj.weight"))
    return out


def smoothing_divisor(activation_alpha: Tensor, weight_alpha: Tensor, strength: float) -> Tensor:
    """Per-channel divisors s = a^strength / w^(1 - strength), scaled to a geometric mean of 1 (SmoothQuant, eq. 4).

    Args:
        activation_alpha: (D,) largest magnitude of each channel of the activation.
        weight_alpha: (D,) largest magnitude of each column of the weights that read it.
        strength: in [0, 1]; how much of the range moves to the weights.

    Returns:
        float32 (D,), positive.
    """
    floor = 1e-5
    a = activation_alpha.to(torch.float32).clamp(min=floor)
    w = weight_alpha.to(torch.float32).clamp(min=floor)
    log = strength * a.log() - (1 - strength) * w.log()
    # Within what every dtype of a model holds as a normal number.
    return (log - log.mean()).clamp(-9, 9).exp()
