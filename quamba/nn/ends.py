"""The two ends of a language model: the int8 embedding and the W8A8 head, tied or not."""

import torch
from torch import Tensor, nn

from quamba import numerics, ops
from quamba.recipe import QuantSpec


class QuantizedEmbedding(nn.Module):
    """An int8 table (V, E) with one scale per row (or one in all); rows are dequantized on look-up."""

    qweight: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        *,
        rows: int,
        width: int,
        spec: QuantSpec,
        dtype: torch.dtype,
        device: torch.device | str = "meta",
    ) -> None:
        """Make an empty table of shape (rows, width) whose look-ups come out in `dtype`."""
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.num_embeddings = rows
        self.embedding_dim = width
        scales = (rows,) if spec.granularity == "channel" else ()
        self.register_buffer("qweight", torch.empty(rows, width, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32, device=device))

    def fill(self, weight: Tensor) -> None:
        """Quantize a float table (V, E), replacing the empty tensors."""
        self.qweight, self.weight_scale = numerics.quantize_weight(
            weight, per_channel=self.spec.granularity == "channel"
        )

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the float table, without data: a meta tensor, for code that asks for either."""
        return torch.empty(self.qweight.shape, dtype=self.dtype, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, E) in the model's dtype."""
        return ops.embedding(ids, self.qweight, self.weight_scale, self.dtype)  # type: ignore[no-any-return]


class QuantizedHead(nn.Module):
    """lm_head in W8A8: hidden states are quantized on entry, logits leave in float32.

    With `tied`, the int8 table is the embedding's own: the head has no weight buffers.
    """

    qweight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        *,
        rows: int,
        width: int,
        bias: bool,
        spec: QuantSpec,
        input_spec: QuantSpec | None,
        dtype: torch.dtype,
        tied: QuantizedEmbedding | None = None,
        device: torch.device | str = "meta",
    ) -> None:
        """Make an empty head.

        Args:
            rows, width: V, E.
            bias: whether there is one.
            spec: of the weight.
            input_spec: of the hidden states; None multiplies float hidden states with the dequantized weight.
            dtype: of the hidden states that callers should pass.
            tied: the embedding whose table serves as the weight, or None.
            device: where the empty tensors lie.
        """
        super().__init__()
        self.spec = spec
        self.input_spec = input_spec
        self.dtype = dtype
        # Not a submodule: the table belongs to the embedding and is saved once, under its name.
        self.__dict__["tied"] = tied
        if tied is None:
            scales = (rows,) if spec.granularity == "channel" else ()
            self.register_buffer("qweight", torch.empty(rows, width, dtype=torch.int8, device=device))
            self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32, device=device))
        if input_spec is not None and input_spec.granularity != "token":
            self.register_buffer("input_scale", torch.empty((), dtype=torch.float32, device=device))
        self.register_buffer("bias", torch.empty(rows, dtype=dtype, device=device) if bias else None)

    def fill(self, weight: Tensor | None, *, bias: Tensor | None, input_scale: Tensor | None) -> None:
        """Quantize a float weight (V, E) (None where tied) and take the input's scale, replacing the empty tensors."""
        if weight is not None:
            self.qweight, self.weight_scale = numerics.quantize_weight(
                weight, per_channel=self.spec.granularity == "channel"
            )
        if input_scale is not None:
            self.input_scale = input_scale
        if self.bias is not None and bias is not None:
            self.bias = bias.detach().to(self.bias.dtype)

    @property
    def table(self) -> "QuantizedEmbedding | QuantizedHead":
        """The module that holds qweight and weight_scale."""
        tied: QuantizedEmbedding | None = self.__dict__["tied"]
        return self if tied is None else tied

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the float weight, without data: a meta tensor, for code that asks for either."""
        return torch.empty(self.table.qweight.shape, dtype=self.dtype, device="meta")

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., E) any float dtype -> logits float32 (..., V)."""
        table = self.table
        if self.input_spec is None:
            scale = table.weight_scale
            weight = numerics.dequantize(table.qweight, scale[:, None] if scale.dim() else scale)
            return torch.nn.functional.linear(hidden.to(torch.float32), weight, self.bias)
        if self.input_spec.granularity == "token":
            q, scale = ops.quantize_per_token(hidden)
        else:
            q, scale = ops.quantize(hidden, self.input_scale), self.input_scale
        return ops.linear(  # type: ignore[no-any-return]
            q, scale, table.qweight, table.weight_scale, self.bias, None, None, torch.float32
        )
