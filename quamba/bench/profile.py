"""The latency profile: a row for each prompt and output length, a column for each model, in its fastest mode."""

from quamba.bench.load import MOST
from quamba.bench.measure import TPOT, TTLT, Case, Figure, Report

_NONE = "—"


def profile(report: Report) -> list[list[str]]:
    """A row of headings, a row for each case, then rows of memory.

    Times are medians in milliseconds with their quartiles, and times as fast as the reference; "~" before a time says
    that it was computed.
    """
    best = {(f.subject, _bare(f.case)): f for f in report.figures if f.case.mode == report.modes[f.subject]}
    names = list(report.modes)
    rows = [["", *names]]
    for case in dict.fromkeys(case for _, case in best):
        found = (best.get((name, case)) for name in names)
        rows.append([_heading(case), *(_NONE if figure is None else _time(figure) for figure in found)])
    memory = [report.memory[name] for name in names]
    rows.append(["checkpoint, MB", *(f"{each.checkpoint / 1e6:.2f}" for each in memory)])
    rows.append(["weights in memory, MB", *(f"{each.weights / 1e6:.2f}" for each in memory)])
    rows.append(["state of a sequence, MB", *(f"{each.state / 1e6:.3f}" for each in memory)])
    peaks = [[f.peak_bytes for f in report.figures if f.subject == name and f.peak_bytes is not None] for name in names]
    if any(peaks):
        rows.append(["most memory besides, MB", *(f"{max(peak) / 1e6:.1f}" if peak else _NONE for peak in peaks)])
    return rows


def caption(report: Report) -> list[str]:
    """What the profile is of, in lines."""
    runs = sorted({figure.time.runs for figure in report.figures if figure.measured})
    count = f"{runs[0]} to {runs[-1]}" if len(runs) > 1 else str(runs[0])
    modes = ", ".join(dict.fromkeys(report.modes.values()))
    over = f"; times as fast as {report.reference}" if report.reference in report.modes else ""
    lines = [
        f"{report.model}, {report.dtype}, {report.device}, {report.date}",
        f"milliseconds: median [quartiles] of {count} runs, {modes}{over}",
    ]
    if any(not figure.measured for figure in report.figures):
        lines.append("~: computed, TTFT + (new tokens - 1) TPOT, not measured")
    return [*lines, *warning(report.others, disturbed=report.disturbed)]


def warning(others: float | None, *, disturbed: bool) -> list[str]:
    """A line for times that are not to be published, none for others."""
    if not disturbed:
        return []
    found = "it is unknown what other processes did" if others is None else f"others kept {others:.0%} of the CPU busy"
    return [f"NOT TO BE PUBLISHED: {found} meanwhile; at most {MOST:.0%} would do"]


def markdown(report: Report) -> str:
    """The profile and its caption in Markdown."""
    rows = ["| " + " | ".join(row) + " |" for row in profile(report)]
    rule = "|---|" + "---:|" * len(report.modes)
    return "\n".join([rows[0], rule, *rows[1:], "", *(f"{line}  " for line in caption(report))])


def milliseconds(value: float) -> str:
    """Four figures or so: 0.778, 12.35, 123.4."""
    return f"{value:.{3 if value < 10 else 2 if value < 100 else 1}f}"


def _bare(case: Case) -> Case:
    """The case without its mode."""
    return Case(case.what, "", case.batch, case.length, case.new_tokens)


def _heading(case: Case) -> str:
    if case.what == TPOT:
        return f"TPOT, batch {case.batch}"
    return f"{case.what}, prompt {case.length}" + (f", {case.new_tokens} new" if case.what == TTLT else "")


def _time(figure: Figure) -> str:
    time = figure.time
    if not figure.measured:
        return f"~{milliseconds(time.median)}"
    speedup = "" if figure.speedup is None else f", {figure.speedup:.2f}x"
    return f"{milliseconds(time.median)} [{_both(time.lower, time.upper)}]{speedup}"


def _both(*values: float) -> str:
    return ", ".join(map(milliseconds, values))
