"""Prefill and decode through a model's own forward, for models that are more than a stack of our blocks."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from quamba.errors import SizeError


class WholeModel:
    """One batch at a time through a transformers model and its cache, eagerly.

    Attributes:
        device: of the model's input.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model: Any = model
        self._cache: DynamicCache | None = None
        self._mask: Tensor | None = None
        self.device: torch.device = next(t.device for t in (*model.parameters(), *model.buffers()))

    def reset(self) -> None:
        """Forget the sequences."""
        self._cache = self._mask = None

    @torch.no_grad()
    def prefill(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Start anew with prompts (B, L), padded on the left where mask (B, L) is 0; (B, V) logits."""
        self._cache = DynamicCache(config=self._model.config)
        self._mask = torch.ones_like(input_ids) if mask is None else mask.to(torch.int64)
        return self._run(input_ids)

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Go on with all sequences by one token each, (B,); (B, V) logits."""
        if self._mask is None or self._mask.shape[0] != tokens.shape[0]:
            found = 0 if self._mask is None else self._mask.shape[0]
            raise SizeError(
                f"found {tokens.shape[0]} tokens for {found} sequences; expected one for each: prefill first"
            )
        self._mask = torch.cat([self._mask, self._mask.new_ones(tokens.shape[0], 1)], dim=1)
        return self._run(tokens.to(self.device, torch.int64)[:, None])

    def _run(self, input_ids: Tensor) -> Tensor:
        assert self._mask is not None
        length = input_ids.shape[1]
        # Padding moves no positions: each sequence counts from its own first token.
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -length:]
        out = self._model(
            input_ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        found: Tensor = out.logits[:, -1]
        return found
