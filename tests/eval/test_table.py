"""The table of a comparison."""

import json
import math
from dataclasses import replace

import pytest

from quamba.bench.timing import Spread
from quamba.errors import QuambaError
from quamba.eval.latency import Latency
from quamba.eval.results import Metric, TaskResult
from quamba.eval.statistics import paired_difference
from quamba.eval.table import cells, lines_of, markdown, notes
from quamba.eval.trials import TextTrial, Trial
from quamba.recipes import RECIPES

NLL = {"float": [3.0, 3.5, 2.0, 4.0], "naive": [3.1, 3.7, 2.0, 4.3], "quamba-w4a4": [4.0, 5.0, 3.0, 4.3]}
RIGHT = {"float": [1.0, 0.0, 1.0, 1.0, 0.0], "naive": [1.0, 0.0, 0.0, 1.0, 0.0], "quamba-w4a4": [0.0] * 5}
TOKENS = [10, 10, 10, 4]


def task(right: list[float]) -> TaskResult:
    share = sum(right) / len(right)
    metrics = {"perplexity": Metric(9.0, math.nan), "acc": Metric(share, 0.1)}
    return TaskResult("words", "1.0", len(right), metrics, {"acc": right}, 8)


def trial(name: str, calibration: str | None = None, **changes: object) -> Trial:
    text = TextTrial(NLL[name], TOKENS, None if name == "float" else 0.25, 30)
    pages = TaskResult("pages", "1.0", 2, {"word_perplexity": Metric(21.5, math.nan)}, {}, 8)
    tasks = {"words": task(RIGHT[name]), "pages": pages}
    fields = {"bytes": 4_828_044, "seconds": 1.5, "texts": {"books": text}, "tasks": tasks, "date": "d"}
    return Trial(RECIPES[name].to_dict(), calibration, **(fields | changes))  # type: ignore[arg-type]


def test_figures() -> None:
    base, line = lines_of([trial("float"), trial("naive", "a")])
    mean = sum(n * t for n, t in zip(NLL["naive"], TOKENS, strict=True)) / 34
    reference = sum(n * t for n, t in zip(NLL["float"], TOKENS, strict=True)) / 34
    text = line.texts["books"]
    assert text.perplexity == pytest.approx(math.exp(mean))
    assert text.increase is not None
    assert text.increase.mean == pytest.approx(math.exp(mean - reference) - 1)
    interval = paired_difference(NLL["naive"], NLL["float"], weights=TOKENS)
    assert text.increase.low == pytest.approx(math.expm1(interval.low))
    assert text.increase.high == pytest.approx(math.expm1(interval.high))
    difference = line.tasks["words"].difference
    assert difference is not None
    assert difference.mean == pytest.approx(-0.2)
    assert difference.low < -0.2 < difference.high == 0.0
    assert line.tasks["pages"].difference is None
    assert base.texts["books"].increase is None
    assert base.tasks["words"].difference is None


def test_cells_and_markdown() -> None:
    lines = lines_of([trial("float"), trial("naive", "a")])
    head, base, row = cells(lines)
    assert len(head) == len(base) == len(row)
    assert head == ["recipe", "weights", "books: perplexity", "increase [95 %]", "KL", "words: acc", "points [95 %]",
                    "pages: word_perplexity"]  # fmt: skip
    assert base == ["float", "4.83 MB", "19.503", "—", "—", "60.00 ± 10.00", "—", "21.5000"]
    assert row[3].startswith("+13.148 % [+")
    assert row[4:6] == ["0.2500", "40.00 ± 10.00"]
    assert row[6].startswith("-20.00 [-60.00, +0.00")
    text = markdown(lines).splitlines()
    assert len(text) == 4
    assert {line.count("|") for line in text} == {9}


def latency(ttft: float, tpot: float, **changes: object) -> Latency:
    times = {
        name: Spread(time, time - 1, time + 1, time - 0.5, time + 0.5, runs)
        for name, time, runs in (("TTFT", ttft, 6), ("TPOT", tpot, 60))
    }
    fields = {"times": times, "prompt": 512, "batch": 1, "mode": "graph", "others": 0.0, "disturbed": False}
    return Latency(**(fields | changes))  # type: ignore[arg-type]


def test_latencies() -> None:
    simulated = trial("quamba-w4a4", "a")
    lines = lines_of(
        [trial("naive", "a", latency=latency(8.0, 2.0)), simulated, trial("float", latency=latency(32, 3))]
    )
    head, *rows = cells(lines)
    assert head[-2:] == ["TTFT (512 tokens), ms", "TPOT (batch 1), ms"]
    assert [row[-2:] for row in rows] == [["8.000 (4.00x)", "2.000 (1.50x)"], ["—", "—"], ["32.000", "3.000"]]
    assert notes(lines) == ["TTFT, TPOT: medians of 6 to 60 runs, graph; in brackets times as fast as float"]
    assert markdown(lines).splitlines()[-2:] == ["", notes(lines)[0] + "  "]
    assert lines[0].to_dict()["latency"]["times"]["TPOT"]["upper"] == 2.5
    assert lines[1].to_dict()["latency"] is None
    assert notes(lines_of([trial("float")])) == []


def test_latencies_that_others_disturbed_are_marked() -> None:
    slow = latency(32, 3, batch=4, prompt=7, mode="eager", others=0.25, disturbed=True)
    lines = lines_of([trial("float", latency=slow), trial("naive", "a", latency=latency(8.0, 2.0, mode="eager"))])
    head, base, row = cells(lines)
    assert head[-2:] == ["TTFT (4 x 7 tokens), ms", "TPOT (batch 4), ms"]
    assert base[-2:] == ["32.000†", "3.000†"]
    assert row[-1] == "2.000 (1.50x)"
    assert (
        notes(lines)[1]
        == "†: NOT TO BE PUBLISHED, others kept up to 25% of the CPU busy meanwhile; at most 5% would do"
    )
    unknown = lines_of([trial("float", latency=replace(slow, others=None))])
    assert "it is unknown what others did" in notes(unknown)[1]


def test_calibrations_have_a_column_where_there_are_several() -> None:
    head, base, *rows = cells(lines_of([trial("float"), trial("naive", "a"), trial("naive", "b")]))
    assert head[1] == "calibration"
    assert [base[1], *(row[1] for row in rows)] == ["—", "a", "b"]


def test_a_simulation_is_marked_and_has_no_size() -> None:
    lines = lines_of([trial("float"), trial("quamba-w4a4", "a")])
    assert cells(lines)[2][:2] == ["quamba-w4a4 (simulation)", "—"]
    assert [line.to_dict()["simulated"] for line in lines] == [False, True]
    assert "| quamba-w4a4 (simulation) | — |" in markdown(lines)


def test_json() -> None:
    content = json.loads(json.dumps([line.to_dict() for line in lines_of([trial("float"), trial("naive", "a")])]))
    assert content[0]["texts"]["books"]["increase"] is None
    assert content[1]["texts"]["books"]["tokens"] == 34
    assert content[1]["tasks"]["words"]["difference"]["mean"] == pytest.approx(-0.2)
    assert content[1]["tasks"]["words"]["metrics"]["perplexity"] == {"value": 9.0, "stderr": None}
    assert "per_document" not in content[1]["tasks"]["words"]


def test_trials_round_trip() -> None:
    first = trial("naive", "a", latency=latency(9.0, 2.5, disturbed=True))
    again = Trial.from_dict(json.loads(json.dumps(first.to_dict())))
    assert again.to_dict() == first.to_dict()
    assert again.tasks["words"].per_document == {"acc": RIGHT["naive"]}
    assert math.isnan(again.tasks["words"].metrics["perplexity"].stderr)
    assert again.latency == first.latency
    assert Trial.from_dict(json.loads(json.dumps(trial("float").to_dict()))).latency is None


def test_without_the_baseline_there_is_no_table() -> None:
    with pytest.raises(QuambaError, match="no trial of recipe 'float'"):
        lines_of([trial("naive", "a")])
