"""What `quamba bench` found, as tables."""

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from quamba.bench.kernels import KernelTime
from quamba.bench.measure import Report
from quamba.bench.profile import caption, milliseconds, profile


def tables(report: Report) -> list[Table | Text]:
    """The profile with its caption, every figure, and the breakdown by kernel."""
    heading, *rows = profile(report)
    summary = Table(title=f"latency of {report.model}", title_justify="left")
    for number, name in enumerate(heading):
        summary.add_column(name, justify="right" if number else "left")
    for row in rows:
        summary.add_row(*map(escape, row))
    about = Text("\n".join(caption(report)))
    return [summary, about, _figures(report), *(_kernels(title, found) for title, found in report.kernels.items())]


def _figures(report: Report) -> Table:
    copied = report.copy_bandwidth
    table = Table(title=f"every figure; copies at {copied / 1e9:.0f} GB/s", title_justify="left")
    for column in ("what", "mode", "model"):
        table.add_column(column)
    for column in (
        "batch",
        "prompt",
        "new",
        "median ms",
        "least - most",
        "runs",
        "speedup",
        "bandwidth",
        "TOP/s",
        "peak",
    ):
        table.add_column(column, justify="right")
    for figure in report.figures:
        case, time = figure.case, figure.time
        table.add_row(
            case.what,
            case.mode,
            figure.subject,
            str(case.batch),
            str(case.length or ""),
            str(case.new_tokens or ""),
            milliseconds(time.median),
            f"{milliseconds(time.least)} - {milliseconds(time.most)}",
            str(time.runs) if figure.measured else "computed",
            "" if figure.speedup is None else f"{figure.speedup:.2f}x",
            "" if figure.bandwidth is None else f"{figure.bandwidth / 1e9:.0f} GB/s, {figure.bandwidth / copied:.0%}",
            "" if figure.operations is None else f"{figure.operations / 1e12:.2f}",
            "" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.0f} MB",
        )
    return table


def _kernels(title: str, found: list[KernelTime]) -> Table:
    table = Table(title=f"kernels of {title}", title_justify="left")
    table.add_column("kernel", max_width=100, no_wrap=True)
    for column in ("calls", "us", "share"):
        table.add_column(column, justify="right")
    total = found[-1].milliseconds
    for kernel in found:
        table.add_row(
            kernel.name, f"{kernel.count:g}", f"{1e3 * kernel.milliseconds:.1f}", f"{kernel.milliseconds / total:.1%}"
        )
    return table
