"""quamba inspect: a model's sites, sizes, and what is float and why."""

from rich.table import Table

from quamba.cli.common import (
    DebugOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    load_model,
    output,
    print_json,
    reporting,
    size,
)
from quamba.inspect import Inspection, Site, inspect_model


def inspect(
    model: ModelArgument, dtype: DtypeOption = None, json: JsonOption = False, debug: DebugOption = False
) -> None:
    """Show MODEL's quantized sites, the size of its parts, and what is float and why."""
    with reporting(debug=debug):
        found = inspect_model(load_model(model, dtype=dtype, device="cpu"))
        if json:
            print_json({"model": model, **found.to_dict()})
            return
        console = output()
        for table in _tables(model, found):
            console.print(table)


def _tables(model: str, found: Inspection) -> list[Table]:
    tables = []
    if found.sites:
        sites = Table(title=f"{model}: {found.model_type}, recipe {found.recipe}", title_justify="left")
        for column in ("site", "granularity"):
            sites.add_column(column)
        for column in ("scale", "alpha", "clipped", "SQNR"):
            sites.add_column(column, justify="right")
        for site in found.sites:
            sites.add_row(
                site.address,
                site.granularity,
                _scale(site),
                "" if site.alpha is None else f"{site.alpha:.4g}",
                "" if site.clipped is None else f"{100 * site.clipped:.4f}%",
                "" if site.sqnr_db is None else f"{site.sqnr_db:.1f} dB",
            )
        tables.append(sites)
    quantized = "not quantized" if found.recipe is None else f"recipe {found.recipe}"
    parts = Table(title=f"{model}: sizes in memory ({quantized})", title_justify="left", show_footer=True)
    total = [sum(getattr(part, kind) for part in found.parts) for kind in ("int8", "scales", "other", "total")]
    parts.add_column("part", "all")
    for column, count in zip(("int8", "scales", "float", "total"), total, strict=True):
        parts.add_column(column, size(count), justify="right")
    for part in found.parts:
        parts.add_row(part.name, *(size(count) for count in (part.int8, part.scales, part.other, part.total)))
    tables.append(parts)
    kept = Table(title=f"{model}: what is float, and why", title_justify="left")
    kept.add_column("part")
    kept.add_column("size", justify="right")
    kept.add_column("why")
    for entry in found.kept_float:
        kept.add_row(entry.name, size(entry.bytes) if entry.bytes else "", entry.reason)
    return [*tables, kept]


def _scale(site: Site) -> str:
    if site.scale_min is None or site.scale_max is None:
        return "at run time"
    if site.scale_min == site.scale_max:
        return f"{site.scale_min:.4g}"
    return f"{site.scale_min:.4g} to {site.scale_max:.4g}"
