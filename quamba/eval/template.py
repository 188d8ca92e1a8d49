"""Evaluation tasks over local files: a template, which is data, says how the lines of a file become questions.

A template is a JSON object:

    {"name": "lambada", "kind": "last_word", "text": "text"}
    {"name": "piqa", "kind": "multiple_choice", "prompt": "Question: {goal}\\nAnswer:",
     "choices": ["sol1", "sol2"], "label": "label"}
    {"name": "wikitext2", "kind": "text", "documents": "wikitext"}

last_word: a JSON-lines file; the last word of each text, after its last space, is to be predicted from what precedes
it. multiple_choice: a JSON-lines file; `prompt` is filled in from the line's fields, `choices` names a field for each
choice or one field with a list of them, `label` the field with the right one's number, counted from 0; or a second
file has these numbers, one a line. text: the likelihood of whole documents.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from quamba.errors import TaskError

KINDS = ("last_word", "multiple_choice", "text")
DOCUMENTS = ("rows", "file", "wikitext")
# A page of WikiText begins with its title, between single equals signs.
_PAGE = re.compile(r"^ = [^=].* = $", re.MULTILINE)


@dataclass(frozen=True)
class TaskTemplate:
    """How the lines of a file become questions.

    Attributes:
        name: of the task, in results.
        kind: one of KINDS.
        data: the file, relative to the template's, or None: then it is named where the task is run.
        labels: the file with the labels of a multiple_choice task, likewise.
        text: the field with the text, for last_word, and for text with documents "rows".
        prompt: for multiple_choice, with {field} for what is filled in.
        choices: for multiple_choice: the fields with the choices, or the one field with a list.
        label: for multiple_choice: the field with the right choice's number, where there is no file of labels.
        documents: for text: "rows" of a JSON-lines file, the "file" as a whole, or the pages of a "wikitext" file,
            detokenized as lm-eval does.
        separator: for the documents of a "file": what stands between two of them.
    """

    name: str
    kind: str
    data: str | None = None
    labels: str | None = None
    text: str = "text"
    prompt: str = ""
    choices: tuple[str, ...] = ()
    label: str = "label"
    documents: str = "rows"
    separator: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise TaskError(f"found kind {self.kind!r} in task {self.name!r}; expected one of {KINDS}")
        if self.documents not in DOCUMENTS:
            raise TaskError(f"found documents {self.documents!r} in task {self.name!r}; expected one of {DOCUMENTS}")
        if self.kind == "multiple_choice" and not (self.prompt and self.choices):
            raise TaskError(f"found no prompt or no choices in task {self.name!r}; multiple_choice needs both")
        if self.separator is not None and (not self.separator or self.documents != "file"):
            raise TaskError(f"found a separator in task {self.name!r}; expected text for it, and documents 'file'")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, without what is at its default."""
        found = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}

    @classmethod
    def from_dict(cls, content: Any, *, where: str) -> "TaskTemplate":
        """Inverse of `to_dict`; `where` names the file in messages. Raises TaskError on anything unknown or missing."""
        if not isinstance(content, Mapping):
            raise TaskError(f"{where}: found {type(content).__name__}; expected a JSON object")
        known = {field.name for field in fields(cls)}
        if not {"name", "kind"} <= set(content) <= known:
            raise TaskError(f"{where}: found the keys {sorted(content)}; expected name, kind, and of {sorted(known)}")
        values = dict(content)
        choices = values.pop("choices", [])
        if not isinstance(choices, list) or not all(isinstance(value, str) for value in [*choices, *values.values()]):
            raise TaskError(f"{where}: found {dict(content)}; expected strings, and a list of strings for choices")
        return cls(**values, choices=tuple(choices))


@dataclass(frozen=True)
class LocalTask:
    """A template and its files."""

    template: TaskTemplate
    data: Path
    labels: Path | None = None

    def files(self) -> list[Path]:
        """What the questions depend on."""
        return [self.data] if self.labels is None else [self.data, self.labels]

    def questions(self) -> list[dict[str, Any]]:
        """One for each document, in the order of the file.

        Returns:
            last_word: {"context", "target"}, the target with the space before it; multiple_choice: {"prompt",
            "choices", "gold"}; text: {"page"}.

        Raises:
            TaskError: a line is not what the template says.
            OSError: a file cannot be read.
        """
        template = self.template
        if template.kind == "text":
            found: list[dict[str, Any]] = [{"page": page} for page in self._pages()]
        elif template.kind == "last_word":
            texts = [self._field(row, template.text, line) for line, row in self._rows()]
            bad = [number for number, text in enumerate(texts) if not text.rpartition(" ")[0].strip()]
            if bad:
                raise TaskError(f"found less than two words in text {bad[0]} of {str(self.data)!r}; expected more")
            found = [{"context": head, "target": " " + word} for head, _, word in (t.rpartition(" ") for t in texts)]
        else:
            found = self._choices()
        if not found:
            raise TaskError(f"found nothing in {str(self.data)!r}; expected at least one document")
        return found

    def _choices(self) -> list[dict[str, Any]]:
        rows = self._rows()
        if self.labels is None:
            golds = [self._value(row, self.template.label, line) for line, row in rows]
        else:
            golds = self.labels.read_text(encoding="utf-8").split()
            if len(golds) != len(rows):
                raise TaskError(f"found {len(golds)} labels in {str(self.labels)!r}; expected one for {len(rows)} rows")
        found = []
        for (line, row), gold in zip(rows, golds, strict=True):
            names = self.template.choices
            value = self._value(row, names[0], line)
            choices = value if len(names) == 1 and isinstance(value, list) else [row.get(name) for name in names]
            if len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
                raise TaskError(f"{self.data}:{line}: found the choices {choices}; expected at least two texts")
            if not str(gold).isdecimal() or int(gold) >= len(choices):
                raise TaskError(f"{self.data}:{line}: found label {gold!r}; expected 0 to {len(choices) - 1}")
            try:
                prompt = self.template.prompt.format_map(row)
            except (KeyError, IndexError, ValueError, AttributeError) as error:
                raise TaskError(
                    f"{self.data}:{line}: the fields {sorted(row)} do not fill the prompt {self.template.prompt!r} "
                    f"({type(error).__name__}: {error})"
                ) from error
            found.append({"prompt": prompt, "choices": choices, "gold": int(gold)})
        return found

    def _pages(self) -> list[str]:
        if self.template.documents == "rows":
            return [self._field(row, self.template.text, line) for line, row in self._rows()]
        text = self.data.read_text(encoding="utf-8")
        if self.template.documents == "wikitext":
            starts = [match.start() for match in _PAGE.finditer(text)]
            if not starts:
                raise TaskError(f"found no line ' = Title = ' in {str(self.data)!r}; expected the pages of WikiText")
            return [text[begin:end] for begin, end in zip(starts, [*starts[1:], len(text)], strict=True)]
        pages = [text] if self.template.separator is None else text.split(self.template.separator)
        return [page for page in pages if page.strip()]

    def _rows(self) -> list[tuple[int, dict[str, Any]]]:
        """(line number, object) of each line that is not blank."""
        rows = []
        for number, line in enumerate(self.data.read_text(encoding="utf-8").split("\n"), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{self.data}:{number}: found a line that is not JSON ({error})") from error
            if not isinstance(row, dict):
                raise TaskError(f"{self.data}:{number}: found {type(row).__name__}; expected a JSON object")
            rows.append((number, row))
        return rows

    def _value(self, row: Mapping[str, Any], name: str, line: int) -> Any:
        if name not in row:
            raise TaskError(f"{self.data}:{line}: found the fields {sorted(row)}; expected {name!r}")
        return row[name]

    def _field(self, row: Mapping[str, Any], name: str, line: int) -> str:
        value = self._value(row, name, line)
        if not isinstance(value, str):
            raise TaskError(f"{self.data}:{line}: found {type(value).__name__} in {name!r}; expected text")
        return value
