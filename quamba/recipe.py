"""Recipes: which tensors are quantized, and how. Data only, with a JSON round trip.

A recipe names every site of a block (design, section 1):

    activations  u x0 z x d B C dt g, and head (the input of lm_head)
    weights      in_proj conv x_proj dt_proj out_proj, and head, embedding

An address is "layers.<i>.<name>" for the parts of a block, or "head.input", "head.weight", "embedding" for the
model's ends; overrides select addresses by glob.
"""

import fnmatch
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from types import MappingProxyType
from typing import Any

from quamba.errors import RecipeError

BLOCK_ACTIVATIONS = ("u", "x0", "z", "x", "d", "B", "C", "dt", "g")
BLOCK_WEIGHTS = ("in_proj", "conv", "x_proj", "dt_proj", "out_proj")
MODEL_ADDRESSES = ("head.input", "head.weight", "embedding")

GRANULARITIES = ("tensor", "channel", "token")
OBSERVERS = ("absmax", "percentile", "octav")
STEPS = ("smooth_input", "smooth_output", "smooth_head", "rotate_output", "rotate_x", "rotate_residual")

# A scale is free per channel only where the consumer works channel by channel; a GEMM input needs one scale for
# the sum, or one per token (design, section 1.5). x is both: its channel scales go into the columns of x_proj.
_ALLOWED = {
    "u": ("tensor", "token"),
    "x0": ("tensor", "channel"),
    "z": ("tensor", "channel"),
    "x": ("tensor", "channel", "token"),
    "d": ("tensor", "token"),
    "B": ("tensor", "channel"),
    "C": ("tensor", "channel"),
    "dt": ("tensor", "channel"),
    "g": ("tensor", "token"),
    "head.input": ("tensor", "token"),
    **dict.fromkeys((*BLOCK_WEIGHTS, "head.weight", "embedding"), ("tensor", "channel")),
}


@dataclass(frozen=True)
class QuantSpec:
    """How one tensor is quantized.

    Attributes:
        granularity: one scale per "tensor", per "channel" (weights: per output channel or embedding row), or per
            "token" (found at run time).
        observer: how calibration finds the clipping magnitude: "absmax", "percentile" or "octav".
        percentile: the fraction of |values| kept unclipped, in (0.5, 1], for the percentile observer.
        bits: bits per value. 8 is what the ops implement; fewer, from 2, make the recipe a simulation: the values are
            rounded in a float model, to tell what such a format would cost in accuracy.
        headroom: the observer's magnitude times this, at least 1: room for values larger than any in calibration.
            1 where there is nothing to observe: per token and for weights.
        vocabulary: the magnitude is no less than the largest over the model's whole vocabulary, which calibration reads
            once more in random order: text of another kind brings tokens that the calibration data lacks. For
            activations with the observer "absmax" and static scales alone.
    """

    granularity: str = "tensor"
    observer: str = "absmax"
    percentile: float | None = None
    bits: int = 8
    headroom: float = 1.0
    vocabulary: bool = False

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise RecipeError(f"found granularity {self.granularity!r}; expected one of {GRANULARITIES}")
        if self.observer not in OBSERVERS:
            raise RecipeError(f"found observer {self.observer!r}; expected one of {OBSERVERS}")
        if (self.observer == "percentile") != (self.percentile is not None):
            raise RecipeError(
                f"found observer {self.observer!r} with percentile {self.percentile!r}; "
                "expected a percentile exactly where the observer is 'percentile'"
            )
        if self.percentile is not None and not 0.5 < self.percentile <= 1.0:
            raise RecipeError(f"found percentile {self.percentile!r}; expected a fraction in (0.5, 1], such as 0.9999")
        if type(self.bits) is not int or not 2 <= self.bits <= 8:
            raise RecipeError(
                f"found bits {self.bits!r}; expected 8, the width that the ops implement, or 2 to 7 to simulate"
            )
        if not isinstance(self.headroom, (int, float)) or not 1.0 <= self.headroom <= 16.0:
            raise RecipeError(f"found headroom {self.headroom!r}; expected a factor in [1, 16], such as 1.1")
        if self.granularity == "token" and self.headroom != 1:
            raise RecipeError(f"found headroom {self.headroom!r} with granularity 'token'; expected 1")
        if self.granularity == "token" and self.observer != "absmax":
            raise RecipeError(f"found observer {self.observer!r} with granularity 'token'; expected 'absmax'")
        if type(self.vocabulary) is not bool:
            raise RecipeError(f"found vocabulary {self.vocabulary!r}; expected true or false")
        if self.vocabulary and (self.granularity == "token" or self.observer != "absmax"):
            raise RecipeError(
                f"found vocabulary with granularity {self.granularity!r} and observer {self.observer!r}; "
                "expected a static scale and 'absmax': over the vocabulary nothing is clipped"
            )
        if self.granularity == "channel" and self.observer == "octav":
            raise RecipeError("found observer 'octav' with granularity 'channel'; expected granularity 'tensor'")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "QuantSpec":
        """Inverse of `dataclasses.asdict`. Raises RecipeError on unknown keys."""
        return cls(**_known(cls, data))


@dataclass(frozen=True)
class Step:
    """A change of the float model that leaves its function as it is (quamba.transforms).

    Attributes:
        name: one of STEPS.
        alpha: for the smoothing steps, how much of the activations' range moves to the weights, in [0, 1].
        reach: for smooth_input, at least 1: a channel of u that went beyond this many times the clip of all of u moves
            as much more as brings it there. A percentile over all channels does not see one channel that rare
            tokens drive, and those tokens may be frequent in other text. None leaves such channels clipped.
    """

    name: str
    alpha: float | None = None
    reach: float | None = None

    def __post_init__(self) -> None:
        if self.name not in STEPS:
            raise RecipeError(f"found step {self.name!r}; expected one of {STEPS}")
        if (self.alpha is not None) != self.name.startswith("smooth_"):
            raise RecipeError(f"found step {self.name!r} with alpha {self.alpha!r}; the smoothing steps alone have one")
        if self.alpha is not None and not 0.0 <= self.alpha <= 1.0:
            raise RecipeError(f"found alpha {self.alpha!r} in step {self.name!r}; expected a number in [0, 1]")
        if self.reach is not None and self.name != "smooth_input":
            raise RecipeError(f"found reach {self.reach!r} in step {self.name!r}; expected it in 'smooth_input' alone")
        if self.reach is not None and (not isinstance(self.reach, (int, float)) or not 1.0 <= self.reach <= 16.0):
            raise RecipeError(f"found reach {self.reach!r}; expected a factor in [1, 16], such as 1.1, or None")

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Step":
        """Inverse of `dataclasses.asdict`. Raises RecipeError on unknown keys."""
        return cls(**_known(cls, data))


@dataclass(frozen=True)
class Override:
    """Another spec for the addresses that match a glob; spec None keeps them in float.

    The pattern matches whole addresses ("layers.3.x", "layers.*.in_proj", "head.*"), or a layer ("layers.0"), which
    stands for everything in it, or "head", which stands for its input and its weight.
    """

    pattern: str
    spec: QuantSpec | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.pattern, str):
            raise RecipeError(f"found pattern {self.pattern!r}; expected a glob such as 'layers.*.x'")

    def matches(self, address: str) -> bool:
        """True where the pattern matches the address or what holds it."""
        return any(fnmatch.fnmatchcase(part, self.pattern) for part in (address, address.rpartition(".")[0]) if part)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Override":
        """Inverse of `dataclasses.asdict`. Raises RecipeError on unknown keys."""
        data = _known(cls, data)
        spec = data.get("spec")
        return cls(data["pattern"], None if spec is None else QuantSpec.from_dict(spec))


@dataclass(frozen=True)
class BlockFormat:
    """A recipe resolved for one block: a spec or None (float) per site and weight, and the steps that apply."""

    activations: Mapping[str, QuantSpec | None]
    weights: Mapping[str, QuantSpec | None]
    steps: tuple[Step, ...]

    @property
    def is_float(self) -> bool:
        """True where nothing in the block is quantized."""
        return all(spec is None for spec in (*self.activations.values(), *self.weights.values()))

    @property
    def simulated(self) -> bool:
        """True where the block rounds to fewer bits than the ops implement, which is done in float."""
        return any(spec is not None and spec.bits != 8 for spec in (*self.activations.values(), *self.weights.values()))

    def granularity(self, site: str) -> str | None:
        """The granularity of an activation site, or None where it stays in float."""
        spec = self.activations[site]
        return None if spec is None else spec.granularity

    def step(self, name: str) -> Step | None:
        """The step of that name, or None where it does not apply to this block."""
        return next((step for step in self.steps if step.name == name), None)


# Which activation a step serves: where that one stays in float in a block, the step is left out there.
_STEP_SITE = {"smooth_input": "u", "smooth_output": "g", "rotate_output": "g", "rotate_x": "x"}


@dataclass(frozen=True)
class Recipe:
    """A named way to quantize a model.

    Attributes:
        name: what to call it.
        activations: site -> spec, or None for float; every block site, and "head.input".
        weights: weight -> spec, or None for float; every block weight, "head.weight" and "embedding".
        steps: function-preserving changes, in order.
        overrides: exceptions by glob; the last one that matches an address wins.
    """

    name: str
    activations: Mapping[str, QuantSpec | None]
    weights: Mapping[str, QuantSpec | None]
    steps: tuple[Step, ...] = ()
    overrides: tuple[Override, ...] = field(default=())

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise RecipeError(f"found the name {self.name!r}; expected text")
        for kind, found, expected in (
            ("activations", self.activations, {*BLOCK_ACTIVATIONS, "head.input"}),
            ("weights", self.weights, {*BLOCK_WEIGHTS, "head.weight", "embedding"}),
        ):
            if set(found) != expected:
                raise RecipeError(
                    f"recipe {self.name!r}: {kind} name {sorted(found)}; expected exactly {sorted(expected)}"
                )
            for site, spec in found.items():
                _check_allowed(site, spec, where=f"recipe {self.name!r}")
            object.__setattr__(self, kind, MappingProxyType(dict(found)))
        if self.head_smoothing is not None:
            head = self.spec("head.input")
            if self.rotates_residual or (head is not None and head.granularity == "token"):
                raise RecipeError(
                    f"recipe {self.name!r}: found smooth_head with "
                    f"{'rotate_residual' if self.rotates_residual else 'a scale per token of head.input'}; "
                    "expected one of them"
                )

    def __reduce__(self) -> tuple[Any, ...]:
        return (Recipe.from_dict, (self.to_dict(),))

    def with_overrides(self, overrides: Iterable[Override]) -> "Recipe":
        """The same recipe with further overrides, which win over the earlier ones."""
        return replace(self, overrides=(*self.overrides, *overrides))

    def spec(self, address: str) -> QuantSpec | None:
        """The spec of one address, overrides applied. Raises RecipeError for one that does not exist."""
        parts = address.split(".")
        block = len(parts) == 3 and parts[0] == "layers" and parts[1].isdecimal()
        site = parts[2] if block else address
        if site not in ((*BLOCK_ACTIVATIONS, *BLOCK_WEIGHTS) if block else MODEL_ADDRESSES):
            raise RecipeError(f"found address {address!r}; expected 'layers.<i>.<site>' or one of {MODEL_ADDRESSES}")
        spec = self.activations[site] if site in self.activations else self.weights[site]
        for override in self.overrides:
            if override.matches(address):
                spec = override.spec
        _check_allowed(site, spec, where=f"recipe {self.name!r}, address {address!r}")
        return spec

    def block(self, layer: int) -> BlockFormat:
        """What the recipe says of the block with that layer number."""
        activations = {site: self.spec(f"layers.{layer}.{site}") for site in BLOCK_ACTIVATIONS}
        weights = {name: self.spec(f"layers.{layer}.{name}") for name in BLOCK_WEIGHTS}
        steps = tuple(
            step
            for step in self.steps
            if step.name != "smooth_head" and activations.get(_STEP_SITE.get(step.name, ""), "always") is not None
        )
        return BlockFormat(activations=activations, weights=weights, steps=steps)

    @property
    def rotates_residual(self) -> bool:
        """True where the whole residual stream is rotated, which unties head and embedding."""
        return any(step.name == "rotate_residual" for step in self.steps)

    @property
    def head_smoothing(self) -> float | None:
        """The strength at which the head's input is smoothed; None where it is not, or is not quantized."""
        step = next((step for step in self.steps if step.name == "smooth_head"), None)
        if step is None or self.spec("head.input") is None or self.spec("head.weight") is None:
            return None
        return step.alpha

    @property
    def simulated(self) -> bool:
        """True where a spec has fewer bits than the ops implement: the model can be judged, but not saved."""
        specs = (*self.activations.values(), *self.weights.values(), *(override.spec for override in self.overrides))
        return any(spec is not None and spec.bits != 8 for spec in specs)

    @property
    def label(self) -> str:
        """The name for tables and messages: that of a simulation says so."""
        return f"{self.name} (simulation)" if self.simulated else self.name

    def check(self, layers: Iterable[int]) -> None:
        """Raise RecipeError where an override matches no address of a model with those layer numbers."""
        parts = (*BLOCK_ACTIVATIONS, *BLOCK_WEIGHTS)
        addresses = [*MODEL_ADDRESSES, *(f"layers.{i}.{part}" for i in layers for part in parts)]
        for override in self.overrides:
            if not any(override.matches(address) for address in addresses):
                raise RecipeError(
                    f"override {override.pattern!r} matches nothing; expected a glob over addresses such as "
                    f"{addresses[3]!r}, 'layers.*.x', 'layers.0', 'head' or 'embedding'"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "name": self.name,
            "activations": {site: None if spec is None else asdict(spec) for site, spec in self.activations.items()},
            "weights": {name: None if spec is None else asdict(spec) for name, spec in self.weights.items()},
            "steps": [asdict(step) for step in self.steps],
            "overrides": [asdict(override) for override in self.overrides],
        }

    def to_json(self) -> str:
        """The recipe as JSON text; `from_json` reads it back equal."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Recipe":
        """Inverse of `to_dict`. Raises RecipeError on anything unknown or missing."""
        data = _known(cls, data)
        try:
            return cls(
                name=data["name"],
                activations=_specs(data["activations"]),
                weights=_specs(data["weights"]),
                steps=tuple(Step.from_dict(step) for step in data.get("steps", ())),
                overrides=tuple(Override.from_dict(override) for override in data.get("overrides", ())),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise RecipeError(f"found a malformed recipe ({error!r}); expected the form of Recipe.to_dict()") from error

    @classmethod
    def from_json(cls, text: str) -> "Recipe":
        """Inverse of `to_json`. Raises RecipeError on anything unknown, missing or not JSON."""
        try:
            data = json.loads(text)
        except ValueError as error:
            raise RecipeError(
                f"found text that is not JSON ({error}); expected the form of Recipe.to_json()"
            ) from error
        return cls.from_dict(data)


def _specs(data: Mapping[str, Any]) -> dict[str, QuantSpec | None]:
    return {key: None if value is None else QuantSpec.from_dict(value) for key, value in data.items()}


def _known(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(cls)}
    if not isinstance(data, Mapping) or not set(data) <= names:
        found = sorted(data) if isinstance(data, Mapping) else repr(data)
        raise RecipeError(f"{cls.__name__}: found {found}; expected an object with keys among {sorted(names)}")
    return dict(data)


def _check_allowed(site: str, spec: QuantSpec | None, *, where: str) -> None:
    if spec is None:
        return
    if not isinstance(spec, QuantSpec):
        raise RecipeError(f"{where}: found {spec!r} for {site!r}; expected a QuantSpec or None")
    if spec.bits != 8 and site in MODEL_ADDRESSES:
        raise RecipeError(f"{where}: found bits {spec.bits} for {site!r}; expected 8: only blocks are simulated")
    if spec.headroom != 1 and site in (*BLOCK_WEIGHTS, "head.weight", "embedding"):
        raise RecipeError(f"{where}: found headroom {spec.headroom!r} for the weight {site!r}; expected 1")
    if spec.vocabulary and site in (*BLOCK_WEIGHTS, "head.weight", "embedding"):
        raise RecipeError(f"{where}: found vocabulary for the weight {site!r}; expected it for activations alone")
    if spec.granularity not in _ALLOWED[site]:
        raise RecipeError(
            f"{where}: found granularity {spec.granularity!r} for {site!r}; expected one of {_ALLOWED[site]}"
        )
