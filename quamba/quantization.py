"""What was done to a model, as data: the recipe and what calibration saw. It travels with the model."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import MappingProxyType
from typing import Any

from quamba.errors import RecipeError
from quamba.recipe import Recipe


@dataclass(frozen=True)
class SiteStatistics:
    """What calibration saw at one site, in the site's coordinates.

    Attributes:
        alpha: the largest clipping magnitude (over channels), scale * 127.
        clipped: the share of the values beyond it, in [0, 1].
        sqnr_db: signal-to-quantization-noise ratio of the site alone, in dB.
    """

    alpha: float
    clipped: float
    sqnr_db: float


@dataclass(frozen=True)
class Quantization:
    """The recipe of a quantized model, and the statistics of its sites by address."""

    recipe: Recipe
    statistics: Mapping[str, SiteStatistics]

    def __post_init__(self) -> None:
        object.__setattr__(self, "statistics", MappingProxyType(dict(self.statistics)))

    def __reduce__(self) -> tuple[Any, ...]:
        return (Quantization.from_dict, (self.to_dict(),))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "recipe": self.recipe.to_dict(),
            "statistics": {address: asdict(statistics) for address, statistics in self.statistics.items()},
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Quantization":
        """Inverse of `to_dict`. Raises RecipeError on anything unknown, missing or of the wrong type."""
        names = {f.name for f in fields(SiteStatistics)}
        try:
            if set(data) != {"recipe", "statistics"} or any(set(s) != names for s in data["statistics"].values()):
                raise KeyError(sorted(data))
            statistics = {
                address: SiteStatistics(**{key: float(number) for key, number in values.items()})
                for address, values in data["statistics"].items()
            }
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise RecipeError(
                f"found a malformed quantization ({error!r}); expected the form of Quantization.to_dict()"
            ) from error
        return cls(recipe=Recipe.from_dict(data["recipe"]), statistics=statistics)
