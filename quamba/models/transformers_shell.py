"""What stands in transformers' models in place of a block or a mixer, and what their bookkeeping has to know of it."""

from typing import Any

from torch import Tensor, nn

from quamba.models.adapter import Shell
from quamba.models.cache import padding_mask, state_of


class TransformersShell(Shell):
    """Speaks the call of transformers' Mamba blocks and mixers; whether it adds the residual is the mixer's to know."""

    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Any = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        state = state_of(cache_params, self.layer, self.mixer, hidden_states)
        out: Tensor = self.mixer(hidden_states, mask=padding_mask(attention_mask, hidden_states), state=state)
        return out


def drop_ties(model: nn.Module) -> None:
    """Tell transformers that no parameters are tied any more: a tied head reads the embedding's table itself."""
    attributes: Any = model
    attributes._tied_weights_keys = {}
    attributes.all_tied_weights_keys = {}
