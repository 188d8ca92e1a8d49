"""The profile's cells and its caption."""

from dataclasses import replace

from quamba.bench.measure import Case, Figure, Memory, Report
from quamba.bench.profile import caption, markdown, profile
from quamba.bench.timing import Plan, Spread


def figure(subject: str, case: Case, median: float, *, runs: int = 60, peak: int | None = None, **options: object):
    time = Spread(median, median - 0.5, median + 2, median - 0.25, median + 1, runs)
    return Figure(subject, case, time, peak, None, None, **options)


PREFILL, EAGER = Case("TTFT", "graph", 1, 512), Case("TTFT", "eager", 1, 512)
STEP, WHOLE = Case("TPOT", "graph", 4), Case("TTLT", "graph", 1, 512, 64)
REPORT = Report(
    model="m", dtype="float16", device="a GPU", modes={"mamba-ssm": "graph", "quamba-c": "graph", "hybrid": "eager"},
    reference="mamba-ssm", date="today", versions={}, plan=Plan(), others=0.5, disturbed=False, copy_bandwidth=1.0,
    memory={
        "mamba-ssm": Memory(5_550_000_000, 5_540_000_000, 22_000_000),
        "quamba-c": Memory(2_850_000_000, 2_840_000_000, 21_000_000),
        "hybrid": Memory(1_000_000, 1_000_000, 0),
    },
    figures=(
        figure("mamba-ssm", PREFILL, 32.0, peak=7_000_000),
        figure("quamba-c", PREFILL, 9.5, peak=3_000_000, speedup=32 / 9.5),
        figure("mamba-ssm", EAGER, 64.0, peak=5_000_000),
        figure("quamba-c", EAGER, 16.0, peak=4_000_000, speedup=4.0),
        figure("hybrid", EAGER, 8.0),
        figure("quamba-c", STEP, 1.25, runs=30),
        figure("mamba-ssm", WHOLE, 280.0, runs=0),
        figure("quamba-c", WHOLE, 140.0, runs=6),
    ),
)  # fmt: skip


def test_cells() -> None:
    assert profile(REPORT) == [
        ["", "mamba-ssm", "quamba-c", "hybrid"],
        ["TTFT, prompt 512", "32.00 [31.75, 33.00]", "9.500 [9.250, 10.50], 3.37x", "8.000 [7.750, 9.000]"],
        ["TPOT, batch 4", "—", "1.250 [1.000, 2.250]", "—"],
        ["TTLT, prompt 512, 64 new", "~280.0", "140.0 [139.8, 141.0]", "—"],
        ["checkpoint, MB", "5540.00", "2840.00", "1.00"],
        ["weights in memory, MB", "5550.00", "2850.00", "1.00"],
        ["state of a sequence, MB", "22.000", "21.000", "0.000"],
        ["most memory besides, MB", "7.0", "4.0", "—"],
    ]


def test_caption() -> None:
    assert caption(REPORT) == [
        "m, float16, a GPU, today",
        "milliseconds: median [quartiles] of 6 to 60 runs, graph, eager; times as fast as mamba-ssm",
        "~: computed, TTFT + (new tokens - 1) TPOT, not measured",
    ]
    few = replace(REPORT, figures=REPORT.figures[:2], reference=None, disturbed=True, modes={"quamba-c": "graph"})
    assert caption(few)[1:] == [
        "milliseconds: median [quartiles] of 60 runs, graph",
        "NOT TO BE PUBLISHED: others kept 50% of the CPU busy meanwhile; at most 5% would do",
    ]
    assert "it is unknown what other processes did" in caption(replace(few, others=None))[2]


def test_markdown() -> None:
    lines = markdown(REPORT).splitlines()
    assert lines[1] == "|---|---:|---:|---:|"
    assert {line.count("|") for line in lines[:9]} == {5}
    assert lines[9] == ""
    assert lines[10] == "m, float16, a GPU, today  "
