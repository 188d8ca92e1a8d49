"""Task templates: the format, and the questions that come of it."""

import json
from pathlib import Path
from typing import Any

import pytest

from quamba.errors import TaskError
from quamba.eval.tasks import parse_task
from quamba.eval.template import LocalTask, TaskTemplate

TEMPLATES = Path(__file__).parents[2] / "examples" / "tasks"


def questions(template: TaskTemplate, folder: Path, content: str, labels: str | None = None) -> list[dict[str, Any]]:
    (folder / "data").write_text(content, encoding="utf-8")
    if labels is not None:
        (folder / "labels").write_text(labels)
    return LocalTask(template, folder / "data", None if labels is None else folder / "labels").questions()


def rows(*content: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in content)


def choice(**changes: Any) -> TaskTemplate:
    fields: dict[str, Any] = {"prompt": "{q} is", "choices": ("a", "b")}
    return TaskTemplate("t", "multiple_choice", **(fields | changes))


def test_last_word(tmp_path: Path) -> None:
    found = questions(TaskTemplate("t", "last_word", text="body"), tmp_path, rows({"body": "one  two\nthree four"}))
    assert found == [{"context": "one  two\nthree", "target": " four"}]


def test_multiple_choice_with_fields_and_labels_of_a_file(tmp_path: Path) -> None:
    content = rows({"q": "sky", "a": "blue", "b": "dry"}, {"q": "sea", "a": "up", "b": "wet"}) + "\n"
    found = questions(choice(), tmp_path, content, labels="0\n1\n")
    assert found[0] == {"prompt": "sky is", "choices": ["blue", "dry"], "gold": 0}
    assert found[1]["gold"] == 1


def test_multiple_choice_with_a_list_and_a_label_field(tmp_path: Path) -> None:
    content = rows(
        {"q": "sky", "options": ["x", "y", "z"], "right": 2}, {"q": "o", "options": ["x", "y"], "right": "1"}
    )
    found = questions(choice(choices=("options",), label="right"), tmp_path, content)
    assert [(len(each["choices"]), each["gold"]) for each in found] == [(3, 2), (2, 1)]


def test_documents_of_a_text(tmp_path: Path) -> None:
    def pages(content: str, **settings: Any) -> list[str]:
        return [each["page"] for each in questions(TaskTemplate("t", "text", **settings), tmp_path, content)]

    assert pages(rows({"text": "a b"}, {"text": "c"})) == ["a b", "c"]
    assert pages("a b\nc", documents="file") == ["a b\nc"]
    assert pages("a b|c| \n", documents="file", separator="|") == ["a b", "c"]
    wikitext = " = One = \n x \n = = Part = = \n y \n = Two = Three = \n z \n"
    found = pages(wikitext, documents="wikitext")
    assert found == [" = One = \n x \n = = Part = = \n y \n", " = Two = Three = \n z \n"]


@pytest.mark.parametrize(
    ("template", "content", "labels", "message"),
    [
        (TaskTemplate("t", "last_word"), rows({"body": "a b"}), None, r"data:1: found the fields \['body'\]"),
        (TaskTemplate("t", "last_word"), rows({"text": 3}), None, "found int in 'text'"),
        (TaskTemplate("t", "last_word"), rows({"text": "one two"}, {"text": "one"}), None, "two words in text 1"),
        (TaskTemplate("t", "last_word"), "{\n", None, "data:1: found a line that is not JSON"),
        (TaskTemplate("t", "last_word"), "[]\n", None, "found list; expected a JSON object"),
        (TaskTemplate("t", "last_word"), "\n", None, "found nothing"),
        (choice(), rows({"q": "x", "a": "1", "b": "2"}), None, "expected 'label'"),
        (choice(), rows({"q": "x", "a": "1", "b": "2", "label": 2}), None, "found label 2; expected 0 to 1"),
        (choice(), rows({"q": "x", "a": "1", "b": "2", "label": -1}), None, "found label -1"),
        (choice(), rows({"q": "x", "a": "1", "label": 0}), None, "found the choices"),
        (choice(prompt="{other}"), rows({"a": "1", "b": "2", "label": 0}), None, "do not fill the prompt"),
        (choice(), rows({"q": "x", "a": "1", "b": "2"}), "0\n1\n", "found 2 labels"),
        (TaskTemplate("t", "text", documents="wikitext"), "no title", None, "pages of WikiText"),
    ],
)
def test_malformed_data_raises(
    template: TaskTemplate, content: str, labels: str | None, message: str, tmp_path: Path
) -> None:
    with pytest.raises(TaskError, match=message):
        questions(template, tmp_path, content, labels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a JSON object"),
        ({"name": "t"}, "expected name, kind"),
        ({"name": "t", "kind": "last_word", "extra": "x"}, "extra"),
        ({"name": "t", "kind": "essay"}, "found kind 'essay'"),
        ({"name": "t", "kind": "last_word", "text": 3}, "expected strings"),
        ({"name": "t", "kind": "multiple_choice", "prompt": "p", "choices": "ab"}, "a list of strings for choices"),
        ({"name": "t", "kind": "multiple_choice", "prompt": "p"}, "no prompt or no choices"),
        ({"name": "t", "kind": "text", "documents": "lines"}, "found documents 'lines'"),
        ({"name": "t", "kind": "text", "separator": "|"}, "found a separator"),
        ({"name": "t", "kind": "text", "documents": "file", "separator": ""}, "found a separator"),
    ],
)
def test_malformed_templates_raise(content: Any, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        TaskTemplate.from_dict(content, where="t.json")


@pytest.mark.parametrize("file", sorted(TEMPLATES.glob("*.json")), ids=lambda file: file.stem)
def test_templates_that_ship_round_trip(file: Path) -> None:
    content = json.loads(file.read_text())
    template = TaskTemplate.from_dict(content, where=str(file))
    assert template.name == file.stem
    assert TaskTemplate.from_dict(template.to_dict(), where="again") == template


def test_parse_task(tmp_path: Path) -> None:
    template = {"name": "t", "kind": "multiple_choice", "prompt": "{q}", "choices": ["a", "b"]}
    (tmp_path / "bare.json").write_text(json.dumps(template))
    (tmp_path / "full.json").write_text(json.dumps({**template, "data": "data", "labels": "labels"}))
    for name in ("data", "labels", "other"):
        (tmp_path / name).touch()
    assert parse_task("arc_easy") == "arc_easy"
    bare, full = (
        TaskTemplate.from_dict(json.loads((tmp_path / f"{n}.json").read_text()), where="") for n in ("bare", "full")
    )
    assert parse_task(f"{tmp_path}/full.json") == LocalTask(full, tmp_path / "data", tmp_path / "labels")
    # The template's labels belong to its own data.
    assert parse_task(f"{tmp_path}/full.json={tmp_path}/other") == LocalTask(full, tmp_path / "other")
    found = parse_task(f"{tmp_path}/bare.json={tmp_path}/data,{tmp_path}/labels")
    assert found == LocalTask(bare, tmp_path / "data", tmp_path / "labels")
    with pytest.raises(TaskError, match=r"expected .*=DATA"):
        parse_task(f"{tmp_path}/bare.json")
    with pytest.raises(TaskError, match="found no file"):
        parse_task(f"{tmp_path}/bare.json={tmp_path}/absent")
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(TaskError, match="not JSON"):
        parse_task(f"{tmp_path}/broken.json=x")
