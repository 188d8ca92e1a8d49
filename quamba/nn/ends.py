"""The two ends of a language model: the int8 embedding and the W8A8 head, tied or not."""

from typing import TypeGuard

import torch
from torch import Tensor, nn

from quamba import numerics, ops
from quamba.recipe import QuantSpec


class QuantizedEmbedding(nn.Module):
    """An int8 table (V, E) with one scale per row (or one in all); rows are dequantized on look-up.

    A table that is also the weight of a head with a scale per channel of its input has those scales in its columns;
    `column_scale` takes them out again.
    """

    qweight: Tensor
    weight_scale: Tensor
    column_scale: Tensor | None

    def __init__(
        self,
        *,
        rows: int,
        width: int,
        spec: QuantSpec,
        dtype: torch.dtype,
        columns: bool = False,
        device: torch.device | str = "meta",
    ) -> None:
        """Make an empty table.

        Args:
            rows, width: V, E.
            spec: of the table.
            dtype: of the rows looked up.
            columns: whether scales lie in the columns of the table.
            device: where the empty tensors lie.
        """
        super().__init__()
        self.spec = spec
        self.dtype = dtype
        self.num_embeddings = rows
        self.embedding_dim = width
        scales = (rows,) if spec.granularity == "channel" else ()
        self.register_buffer("qweight", torch.empty(rows, width, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.empty(scales, dtype=torch.float32, device=device))
        column_scale = torch.empty(width, dtype=torch.float32, device=device) if columns else None
        self.register_buffer("column_scale", column_scale)

    def fill(self, weight: Tensor, *, columns: Tensor | None = None) -> None:
        """Quantize a float table (V, E), replacing the empty tensors; `columns`: the head's input scales (E,)."""
        self.qweight, self.weight_scale = numerics.quantize_weight(
            weight, per_channel=self.spec.granularity == "channel", columns=columns
        )
        if columns is not None:
            self.column_scale = columns.reciprocal().to(self.qweight.device)

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the float table, without data: a meta tensor, for code that asks for either."""
        return torch.empty(self.qweight.shape, dtype=self.dtype, device="meta")

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L) -> (B, L, E) in the model's dtype."""
        return ops.embedding(ids, self.qweight, self.weight_scale, self.column_scale, self.dtype)  # type: ignore[no-any-return]


class QuantizedHead(nn.Module):
    """lm_head in W8A8: hidden states are quantized on entry, logits leave in float32.

    With `tied`, the int8 table is the embedding's own: the head has no weight buffers. `input_scale` is one for all,
    or, where the recipe smooths the head, one per channel, which then lies in the columns of the weight.
    """

    qweight: Tensor
    weight_scale: Tensor
    input_scale: Tensor
    unit_scale: Tensor
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
        smooth: bool = False,
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
            smooth: whether the hidden states have one static scale per channel.
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
        self.smooth = smooth
        if self.static:
            scales = (width,) if smooth else ()
            self.register_buffer("input_scale", torch.empty(scales, dtype=torch.float32, device=device))
        if smooth:
            self.register_buffer("unit_scale", torch.empty((), dtype=torch.float32, device=device), persistent=False)
        self.register_buffer("bias", torch.empty(rows, dtype=dtype, device=device) if bias else None)

    def fill(self, weight: Tensor | None, *, bias: Tensor | None, input_scale: Tensor | None) -> None:
        """Quantize a float weight (V, E) (None where tied) and take the input's scale, replacing the empty tensors."""
        if weight is not None:
            self.qweight, self.weight_scale = numerics.quantize_weight(
                weight, per_channel=self.spec.granularity == "channel", columns=input_scale if self.smooth else None
            )
        if input_scale is not None:
            self.input_scale = input_scale
        if self.bias is not None and bias is not None:
            self.bias = bias.detach().to(self.bias.dtype)
        self.finalize()

    def finalize(self) -> None:
        """Derive what the op reads from the filled buffers."""
        if self.smooth:
            self.unit_scale = torch.ones((), dtype=torch.float32, device=self.input_scale.device)

    @property
    def table(self) -> "QuantizedEmbedding | QuantizedHead":
        """The module that holds qweight and weight_scale."""
        tied: QuantizedEmbedding | None = self.__dict__["tied"]
        return self if tied is None else tied

    @property
    def weight(self) -> Tensor:
        """Shape and dtype of the float weight, without data: a meta tensor, for code that asks for either."""
        return torch.empty(self.table.qweight.shape, dtype=self.dtype, device="meta")

    @property
    def static(self) -> bool:
        """Whether the hidden states have static scales: `normed` then serves."""
        return self.input_spec is not None and self.input_spec.granularity != "token"

    def normed(self, stream: Tensor, weight: Tensor, eps: float) -> Tensor:
        """The final RMSNorm and the head, with one rounding between them; only where `static`.

        Args:
            stream: (..., E) any float dtype, the residual stream behind the last block.
            weight, eps: (E,) any float dtype, and the constant, of the norm.

        Returns:
            Logits float32 (..., V).
        """
        return self._logits(ops.rms_norm_quant(stream, weight, self.input_scale, eps), self._spent_scale())

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden (..., E) any float dtype -> logits float32 (..., V)."""
        if self.input_spec is None:
            table = self.table
            scale = table.weight_scale
            weight = numerics.dequantize(table.qweight, scale[:, None] if scale.dim() else scale)
            return torch.nn.functional.linear(hidden.to(torch.float32), weight, self.bias)
        if not self.static:
            return self._logits(*ops.quantize_per_token(hidden))
        return self._logits(ops.quantize(hidden, self.input_scale), self._spent_scale())

    def _spent_scale(self) -> Tensor:
        """The static scale that the product still has to apply: one per channel lies in the weight's columns."""
        return self.unit_scale if self.smooth else self.input_scale

    def _logits(self, q: Tensor, scale: Tensor) -> Tensor:
        table = self.table
        return ops.linear(  # type: ignore[no-any-return]
            q, scale, table.qweight, table.weight_scale, self.bias, None, None, torch.float32
        )


def takes_norm(head: nn.Module, stream: Tensor) -> TypeGuard[QuantizedHead]:
    """Whether `head.normed` stands for the final norm and the head: on CUDA that is one launch instead of seven.

    Elsewhere nothing is gained, and the bits stay those of the model's own forward.
    """
    return stream.is_cuda and isinstance(head, QuantizedHead) and head.static
