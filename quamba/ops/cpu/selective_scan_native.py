"""selective_scan on the CPU in the native library quamba/_cpu: what its C++ function reads is packed here."""

import torch
from torch import Tensor

from quamba.ops import native


def _plain(value: Tensor) -> Tensor:
    """The same values as int8 or float32, the last dimension contiguous."""
    value = value if value.dtype is torch.int8 else value.float()
    return value if value.stride(-1) == 1 else value.contiguous()


def selective_scan_native(
    *,
    inputs: dict[str, Tensor],
    scales: dict[str, Tensor | None],
    vectors: dict[str, Tensor],
    out_dtype: torch.dtype,
    state: Tensor | None,
) -> Tensor:
    """The scan in quamba/_cpu: `inputs` are x, dt, B, C and z where there is one, `scales` all six by name."""
    plain = {name: _plain(tensor) for name, tensor in inputs.items()}
    x = plain["x"]
    floats = {name: native.float32(tensor) for name, tensor in vectors.items()}
    carried = None if state is None else state.contiguous()
    out = torch.empty(x.shape, dtype=torch.int8 if out_dtype is torch.int8 else torch.float32, device="cpu")
    values: dict[str, Tensor | float | None] = {"z": None, "z_int8": 0, "z_batch_stride": 0, "z_stride": 0}
    for name, tensor in plain.items():
        values[name] = tensor
        values[f"{name}_int8"] = tensor.dtype is torch.int8
        values[f"{name}_batch_stride"], values[f"{name}_stride"], _ = tensor.stride()
    batch, length, inner = x.shape
    native.run(
        "selective_scan",
        batch=batch,
        length=length,
        d_inner=inner,
        d_state=vectors["A"].shape[1],
        threads=torch.get_num_threads(),
        out=out,
        state=carried,
        **values,
        **floats,
        **{f"{name}_scale": native.scale(scale) for name, scale in scales.items()},
    )
    if state is not None and carried is not state and carried is not None:
        state.copy_(carried)
    return out if out.dtype is out_dtype else out.to(out_dtype)
