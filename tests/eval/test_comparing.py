"""Comparisons: what runs, on what, and what is kept when it stops half way."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

import quamba
from quamba.bench.timing import Plan as Timing
from quamba.checkpoint.sizes import checkpoint_dtype, weight_bytes
from quamba.errors import CalibrationError, QuambaError, RecipeError
from quamba.eval import comparing, perplexity
from quamba.eval.comparing import run_trials
from quamba.eval.latency import Latency, LatencySettings
from quamba.eval.perplexity import compare
from quamba.eval.state import StateFile
from quamba.eval.trials import FLOAT, Plan, Trial
from quamba.recipes import RECIPES
from quamba.text import TextPart, windows
from tests.shipped import save_small_model, text_of

Load = Callable[[], Any]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_small_model(tmp_path_factory.mktemp("model"))
    (folder / "text.txt").write_text(text_of(4000), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def load(folder: Path) -> Load:
    return lambda: AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def plan_of(folder: Path, *recipes: str, **changes: Any) -> Plan:
    text = str(folder / "text.txt")
    fields: dict[str, Any] = {
        "recipes": tuple(RECIPES[name] for name in recipes),
        "calibrations": (TextPart("first", text, 0, 300),),
        "texts": (TextPart("rest", text, 300),),
        "samples": 3,
        "seq_len": 40,
        "context": 64,
    }
    return Plan(**(fields | changes))


def test_a_trial_is_quantize_and_perplexity(folder: Path, tokenizer: Any, load: Load) -> None:
    trials = run_trials(plan_of(folder, "quamba-c", "dynamic"), load, tokenizer)
    assert [trial.key for trial in trials] == [(FLOAT, None), ("quamba-c", "first"), ("dynamic", None)]
    ids = TextPart("", str(folder / "text.txt")).ids(tokenizer)
    data = list(windows(ids[:300], length=40, count=3))
    original = quamba.quantize(load(), None, "float")
    for trial in trials:
        model = quamba.quantize(load(), data, trial.name)
        expected = perplexity(model, ids[300:], context=64)
        assert trial.texts["rest"].window_nll == expected.window_nll.tolist()
        assert trial.texts["rest"].window_tokens == expected.window_tokens.tolist()
        if trial.name != FLOAT:
            # The whole text fits the memory for the divergence, but for the last, shorter window.
            whole = windows(ids[300:], length=64).flatten()
            assert trial.texts["rest"].kl == pytest.approx(compare(model, original, whole, context=64).kl, rel=1e-5)
            assert trial.texts["rest"].kl_tokens == len(whole) // 64 * 63
    assert trials[0].texts["rest"].kl is None
    assert trials[1].recipe == RECIPES["quamba-c"].to_dict()


def test_settings_reach_quantize(folder: Path, tokenizer: Any, load: Load) -> None:
    plan = plan_of(folder, "quamba", percentile=0.9, keep=("layers.0",), limit=2)
    trial = run_trials(plan, load, tokenizer)[1]
    ids = TextPart("", str(folder / "text.txt")).ids(tokenizer)
    data = list(windows(ids[:300], length=40, count=3))
    model = quamba.quantize(load(), data, "quamba", percentile=0.9, keep=["layers.0"])
    assert trial.texts["rest"].window_nll == perplexity(model, ids[300:428], context=64).window_nll.tolist()


@pytest.mark.parametrize("recipe", [FLOAT, "quamba-c", "mamba-had", "dynamic"])
def test_weight_bytes_are_those_of_the_file(
    recipe: str, folder: Path, tokenizer: Any, load: Load, tmp_path: Path
) -> None:
    saved = folder
    model = load()
    if recipe != FLOAT:
        data = [torch.arange(40)]
        quamba.quantize(model, data, recipe)
        quamba.quantize(AutoModelForCausalLM.from_pretrained(folder), data, recipe).save_pretrained(tmp_path)
        saved = tmp_path
    with safe_open(saved / "model.safetensors", "pt") as file:
        expected = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert checkpoint_dtype(load()) == torch.bfloat16
    assert weight_bytes(model, dtype=torch.bfloat16) == expected


def test_each_recipe_has_a_fresh_model_and_each_calibration_a_trial(folder: Path, tokenizer: Any, load: Load) -> None:
    loaded = []

    def counting() -> Any:
        loaded.append(load())
        return loaded[-1]

    text = str(folder / "text.txt")
    plan = plan_of(
        folder, "naive", "dynamic", calibrations=(TextPart("a", text, 0, 200), TextPart("b", text, 200, 400))
    )
    trials = run_trials(plan, counting, tokenizer)
    assert [trial.key for trial in trials] == [(FLOAT, None), ("naive", "a"), ("naive", "b"), ("dynamic", None)]
    assert trials[1].texts["rest"].window_nll != trials[2].texts["rest"].window_nll
    assert len({id(model) for model in loaded}) == 4


def test_a_crash_loses_only_the_recipe_it_happened_in(
    folder: Path, tokenizer: Any, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plan_of(folder, "naive", "hadamard", "quamba")
    whole = run_trials(plan, load, tokenizer)
    path = tmp_path / "new" / "state.json"
    quantized = []

    def failing(model: Any, data: Any, recipe: Any, **options: Any) -> Any:
        quantized.append(recipe.name)
        if recipe.name == "hadamard" and quantized.count("hadamard") == 1:
            raise RuntimeError("crash")
        return quamba.quantize(model, data, recipe, **options)

    monkeypatch.setattr(comparing, "quantize", failing)
    state = StateFile(path, {"of": "this"}, recipes=plan.recipes, restart=False)
    with pytest.raises(RuntimeError, match="crash"):
        run_trials(plan, load, tokenizer, keep=state.add)
    again = StateFile(path, {"of": "this"}, recipes=plan.recipes, restart=False)
    assert [trial.name for trial in again.trials] == [FLOAT, "naive"]
    found = run_trials(plan, load, tokenizer, done=again.trials, keep=again.add)
    assert quantized == [FLOAT, "naive", "hadamard", FLOAT, "hadamard", "quamba"]
    assert [trial.texts for trial in found] == [trial.texts for trial in whole]
    assert [trial.key for trial in found] == [trial.key for trial in whole]
    # A third run does nothing.
    done = StateFile(path, {"of": "this"}, recipes=plan.recipes, restart=False).trials
    run_trials(plan, load, tokenizer, done=done)
    assert len(quantized) == 6
    assert list(path.parent.iterdir()) == [path]


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    path = tmp_path / "state.json"
    state = StateFile(path, {"a": 1, "b": [2]}, recipes=(), restart=False)
    state.add(Trial(recipe=RECIPES["naive"].to_dict(), calibration="x", bytes=1, seconds=0.0))
    return path


def test_state_of_another_comparison_raises(kept: Path) -> None:
    with pytest.raises(QuambaError, match=r"a comparison with other b, c .*--restart"):
        StateFile(kept, {"a": 1, "b": [3], "c": 5}, recipes=(), restart=False)
    other = replace(RECIPES["quamba"], name="naive")
    with pytest.raises(QuambaError, match="another recipe 'naive'"):
        StateFile(kept, {"a": 1, "b": [2]}, recipes=(other,), restart=False)
    assert len(StateFile(kept, {"a": 1, "b": [2]}, recipes=(RECIPES["naive"],), restart=False).trials) == 1


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2}', '{"format": 2, "identity": {}, "trials": [{}]}'])
def test_a_damaged_state_raises(content: str, tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    path.write_text(content)
    with pytest.raises(QuambaError, match="found no comparison"):
        StateFile(path, {}, recipes=(), restart=False)
    assert path.read_text() == content


def test_a_state_of_another_format_raises(kept: Path) -> None:
    kept.write_text(json.dumps(json.loads(kept.read_text()) | {"format": 3}))
    with pytest.raises(QuambaError, match="format 3"):
        StateFile(kept, {"a": 1, "b": [2]}, recipes=(), restart=False)


def test_restart_replaces_the_state_with_the_first_new_trial(kept: Path) -> None:
    before = kept.read_text()
    state = StateFile(kept, {"a": 9}, recipes=(), restart=True)
    assert (state.trials, kept.read_text()) == ([], before)
    state.add(Trial(recipe={"name": "new"}, calibration=None, bytes=2, seconds=0.5))
    assert [trial.name for trial in StateFile(kept, {"a": 9}, recipes=(), restart=False).trials] == ["new"]


def test_identity_tells_the_contents_of_files(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("one")
    part = TextPart("t", str(tmp_path / "text.txt"))
    before = plan_of(folder, texts=(part,)).identity()
    assert json.loads(json.dumps(before)) == before
    assert plan_of(folder, texts=(part,)).identity() == before
    (tmp_path / "text.txt").write_text("two")
    assert plan_of(folder, texts=(part,)).identity() != before


def test_malformed_plans_raise(folder: Path, tokenizer: Any, load: Load) -> None:
    with pytest.raises(RecipeError, match="two recipes named 'naive'"):
        plan_of(folder, "naive", "naive")
    with pytest.raises(QuambaError, match="neither a text nor a task"):
        plan_of(folder, "naive", texts=())
    with pytest.raises(CalibrationError, match="no calibration text for recipe 'naive'"):
        run_trials(plan_of(folder, "dynamic", "naive", calibrations=()), load, tokenizer)


def test_several_processes_raise(folder: Path, tokenizer: Any, load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(QuambaError, match="found 2 processes"):
        run_trials(plan_of(folder, "dynamic"), load, tokenizer)


def test_a_table_of_token_ids_calibrates(folder: Path, tokenizer: Any, load: Load, tmp_path: Path) -> None:
    rows = [{"input_ids": list(range(n, n + 30))} for n in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    trial = run_trials(
        plan_of(folder, "naive", calibrations=(TextPart("t", str(tmp_path / "rows.jsonl")),)), load, tokenizer
    )[1]
    model = quamba.quantize(load(), [torch.tensor(row["input_ids"]) for row in rows[:3]], "naive")
    ids = TextPart("", str(folder / "text.txt")).ids(tokenizer)
    assert trial.texts["rest"].window_nll == perplexity(model, ids[300:], context=64).window_nll.tolist()


def test_latencies_are_measured_but_of_simulations(
    folder: Path, tokenizer: Any, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def timed(model: Any, settings: LatencySettings) -> Latency:
        seen.append((model.quantization.recipe.name, settings))
        return Latency({}, settings.prompt, settings.batch, "eager", None, True)

    monkeypatch.setattr(comparing, "measure_latency", timed)
    settings = LatencySettings(prompt=7, batch=2)
    trials = run_trials(plan_of(folder, "dynamic", "quamba-w4a4", latency=settings), load, tokenizer)
    assert seen == [(FLOAT, settings), ("dynamic", settings)]
    assert [trial.latency and trial.latency.prompt for trial in trials] == [7, 7, None]
    assert all(trial.latency is None for trial in run_trials(plan_of(folder, "dynamic"), load, tokenizer))
    assert len(seen) == 2


def test_what_is_timed_is_part_of_the_identity(folder: Path) -> None:
    without, first, second = (
        plan_of(folder, latency=latency).identity()
        for latency in (None, LatencySettings(), LatencySettings(plan=Timing(seconds=3.0)))
    )
    assert "latency" not in without
    assert json.loads(json.dumps(first))["latency"]["prompt"] == 512
    assert first["latency"] != second["latency"]
