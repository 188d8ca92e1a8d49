"""An analysis as a folder: a report that needs nothing else, its figures as PNGs, the numbers as JSON and arrays."""

import base64
import html
import io
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from quamba.analysis import figures
from quamba.analysis.run import Analysis
from quamba.checkpoint.directory import replacing

REPORT, SUMMARY, ARRAYS = "report.html", "summary.json", "arrays.npz"
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
img { max-width: 100%; height: auto; display: block; margin: 1rem 0; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 0.9rem; }
th, td { padding: 0.2rem 0.8rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; }
h2 { margin-top: 2.5rem; }
"""


@dataclass(frozen=True)
class Section:
    """A figure and what it shows.

    Attributes:
        name: of the PNG, without its ending.
        title: the heading.
        text: a paragraph.
        figure: a matplotlib Figure.
    """

    name: str
    title: str
    text: str
    figure: Any


def sections(found: Analysis) -> Iterator[Section]:
    """All figures, in the order of the report. Raises QuambaError where matplotlib is not installed."""
    yield Section(
        "costs",
        "One tensor at a time: the model's predictions",
        "Each row quantizes one tensor in all layers and leaves everything else in float; the last row is the whole "
        "recipe. y is no site of a recipe: it is quantized here with one absmax scale, as in a model that stores it.",
        figures.costs(found.costs),
    )
    for at, what in (("y", "scan's output y"), ("out", "mixer's output")):
        yield Section(
            f"errors-{at}",
            f"One tensor at a time: the {what}",
            "Every block reads the float model's input. The figures are 10 log10 of squared error over squared signal: "
            "-20 dB is an error of a tenth. Blank: the tensor does not reach this place.",
            figures.error_map(found.errors, at=at),
        )
        yield Section(
            f"time-{at}",
            f"The {what} over time",
            "An error that the recurrence collects would rise with the time step.",
            figures.error_over_time(found.errors, at=at),
        )
    yield Section(
        "channels",
        "Outliers: channels",
        "A flat curve means that one scale serves all channels; a steep one that a few channels take the range.",
        figures.channels(found.outliers),
    )
    yield Section(
        "tails",
        "Outliers: tails",
        "Kurtosis is the mean fourth power over the squared mean square.",
        figures.tails(found.outliers),
    )
    yield Section(
        "decay",
        "How fast the state forgets",
        "The state matrices are diagonal, so a channel's norm is the product of its slowest decay, and the layer's "
        "spectral norm the largest of its channels'. An error of x fades with it.",
        figures.decay(found.decay),
    )
    yield Section(
        "bounds",
        "Bounds for known systems",
        "HiPPO-LegT and HiPPO-LegS fed with INT8 signals: the state's error stays bounded, whatever the length.",
        figures.error_bounds(found.bounds),
    )
    yield Section(
        "positions",
        "Along the sequence",
        "The whole quantized models beside the float one.",
        figures.position_errors(found.positions),
    )


def write(found: Analysis, out: Path, *, title: str) -> dict[str, Any]:
    """Write the folder, as a whole at the end; other files in it are kept.

    Args:
        found: the analysis.
        out: the folder; made where there is none.
        title: of the report, such as the model's name.

    Returns:
        The contents of summary.json.

    Raises:
        QuambaError: matplotlib is not installed.
        OSError: the disk is full, say; the old folder is as it was.
    """
    parts = [(section, figures.png(section.figure)) for section in sections(found)]
    names = {REPORT, SUMMARY, ARRAYS, *(f"{section.name}.png" for section, _ in parts)}
    content = summary(found) | {"title": title}
    with replacing(out, names.__contains__) as new:
        for section, image in parts:
            _put(new / f"{section.name}.png", image)
        _put(new / REPORT, _html(found, parts, title=title).encode())
        _put(new / SUMMARY, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays(found))
        _put(new / ARRAYS, packed.getvalue())
    return content


def _put(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def arrays(found: Analysis) -> dict[str, Any]:
    """Every array by a name such as "errors/naive/out_noise"."""
    groups: dict[str, Any] = {f"errors/{errors.recipe}": errors for errors in found.errors}
    groups |= {f"outliers/{view}": outliers for view, outliers in found.outliers.items()}
    groups |= {f"bounds/{bound.system}": bound for bound in found.bounds}
    groups |= {"decay": found.decay, "positions": found.positions}
    return {
        f"{group}/{name}": value.numpy()
        for group, item in groups.items()
        for name, value in vars(item).items()
        if isinstance(value, Tensor)
    } | {f"errors/{e.recipe}/names": np.array(e.names) for e in found.errors}


def summary(found: Analysis) -> dict[str, Any]:
    """The numbers that fit on a page, as JSON."""
    return {
        "format": "quamba-analysis-1",
        "about": dict(found.about),
        "costs": [{key: _number(value) for key, value in asdict(cost).items()} for cost in found.costs],
        "errors": [
            {
                "recipe": errors.recipe,
                "layers": list(errors.layers),
                **{
                    f"nmse_{at}": {
                        name: [_number(v) for v in row]
                        for name, row in zip(errors.names, errors.nmse(at).tolist(), strict=True)
                    }
                    for at in ("y", "out")
                },
            }
            for errors in found.errors
        ],
        "outliers": {
            view: {
                "layers": list(outliers.layers),
                "kurtosis": outliers.kurtosis.tolist(),
                "peak_over_rms": outliers.peak().tolist(),
                "peak_over_median": (outliers.absmax.amax(dim=1) / outliers.median).tolist(),
                "share_above_10_rms": outliers.share_above(10).tolist(),
            }
            for view, outliers in found.outliers.items()
        },
        "bounds": [
            {
                "system": bound.system,
                "states": bound.states,
                "largest_error_over_eps": float(bound.error.max()),
                "running_bound_over_eps": float(bound.running.max()),
                "closed_form_over_eps": bound.closed,
            }
            for bound in found.bounds
        ],
    }


def _number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _html(found: Analysis, parts: list[tuple[Section, bytes]], *, title: str) -> str:
    heading = html.escape(f"Quantization analysis: {title}")
    body = [f"<h1>{heading}</h1>", _about(found), _table(found)]
    for section, image in parts:
        source = base64.b64encode(image).decode("ascii")
        body += [
            f"<h2>{html.escape(section.title)}</h2>",
            f"<p>{html.escape(section.text)}</p>",
            f'<img alt="{html.escape(section.title)}" src="data:image/png;base64,{source}">',
        ]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f"<style>{_STYLE}</style></head>\n<body>\n" + "\n".join(body) + "\n</body></html>\n"
    )


def _about(found: Analysis) -> str:
    about = found.about
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    return "<p>" + html.escape(
        f"{about['model_type']}, {about['parameters'] / 1e6:.2f} million parameters, {about['mamba_layers']} Mamba "
        f"layers, {about['dtype']}. Calibrated on {about['calibration_tokens']:,} tokens; perplexity over "
        f"{about['evaluation_tokens']:,} others in windows of {about['settings']['context']}. Measured on "
        f"{about['date']} in {about['seconds']:.0f} s on {about['device']}; {versions}."
    ) + "</p>"  # fmt: skip


def _table(found: Analysis) -> str:
    recipes = list(dict.fromkeys(cost.recipe for cost in found.costs))
    names = list(dict.fromkeys(cost.name for cost in found.costs))
    cells = {(cost.recipe, cost.name): cost for cost in found.costs}
    lines = [
        "<table><thead><tr><th>quantized</th>"
        + "".join(f"<th>{html.escape(r)}: perplexity</th><th>KL [nats]</th>" for r in recipes)
        + "</tr></thead><tbody>"
    ]
    for name in sorted(names, key=lambda n: n == "all"):
        row = [f"<td>{html.escape('the whole recipe' if name == 'all' else name)}</td>"]
        for recipe in recipes:
            cost = cells.get((recipe, name))
            row.append(
                "<td>float</td><td></td>"
                if cost is None
                else f"<td>{cost.increase_percent:+.3f} ± {cost.stderr_percent:.3f}%</td><td>{cost.kl:.6f}</td>"
            )
        lines.append(f"<tr>{''.join(row)}</tr>")
    return "\n".join([*lines, "</tbody></table>", "<p>± is one standard error over the windows.</p>"])
