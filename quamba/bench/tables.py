"""What `quamba bench` found, as tables."""

from rich.table import Table

from quamba.bench.kernels import KernelTime
from quamba.bench.measure import Report


def tables(report: Report) -> list[Table]:
    """Times, memory, and the breakdown by kernel."""
    copied = report.copy_bandwidth
    title = f"{report.model}, recipe {report.recipe}, {report.dtype}, {report.device}, {report.date}"
    times = Table(title=f"{title}; copies at {copied / 1e9:.0f} GB/s", title_justify="left")
    for column in ("what", "mode", "model"):
        times.add_column(column)
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
        times.add_column(column, justify="right")
    for figure in report.figures:
        case, time = figure.case, figure.time
        times.add_row(
            case.what,
            case.mode,
            figure.subject,
            str(case.batch),
            str(case.length or ""),
            str(case.new_tokens or ""),
            f"{time.median:.3f}",
            f"{time.least:.3f} - {time.most:.3f}",
            str(time.runs),
            "" if figure.speedup is None else f"{figure.speedup:.2f}x",
            "" if figure.bandwidth is None else f"{figure.bandwidth / 1e9:.0f} GB/s, {figure.bandwidth / copied:.0%}",
            "" if figure.operations is None else f"{figure.operations / 1e12:.2f}",
            "" if figure.peak_bytes is None else f"{figure.peak_bytes / 1e6:.0f} MB",
        )
    weights = Table(title="weights in memory", title_justify="left")
    weights.add_column("model")
    weights.add_column("MB", justify="right")
    for name, count in report.weight_bytes.items():
        weights.add_row(name, f"{count / 1e6:.1f}")
    return [times, weights, *(_kernels(title, found) for title, found in report.kernels.items())]


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
