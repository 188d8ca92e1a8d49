"""The file that a comparison is kept in while it runs: written after each recipe, so that a crash loses only one."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from quamba.errors import QuambaError
from quamba.eval.trials import Trial
from quamba.recipe import Recipe

FORMAT = 2


class StateFile:
    """Trials on disk, under the identity of what they were measured on.

    Attributes:
        path: of the file.
        identity: of the comparison: model, texts, tasks, settings, versions; JSON types.
        trials: those that are done.
    """

    def __init__(self, path: Path, identity: Mapping[str, Any], *, recipes: Sequence[Recipe], restart: bool) -> None:
        """Read the file, where there is one.

        Args:
            path: need not exist.
            identity: what the trials have to have been measured on.
            recipes: a trial of the same name has to be of the same recipe.
            restart: ignore what is there; the first new trial replaces it.

        Raises:
            QuambaError: the file is of another comparison, or none at all.
        """
        self.path, self.identity = path, dict(identity)
        self.trials: list[Trial] = []
        if path.exists() and not restart:
            self.trials = self._read()
            for recipe in recipes:
                for trial in self.trials:
                    if trial.name == recipe.name and trial.recipe != recipe.to_dict():
                        raise self._error(f"another recipe {recipe.name!r}")

    def add(self, trial: Trial) -> None:
        """Keep one more trial."""
        self.trials.append(trial)
        content = {
            "format": FORMAT,
            "identity": self.identity,
            "trials": [each.to_dict() for each in self.trials],
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(self.path.name + ".new")
        with open(beside, "w", encoding="utf-8") as file:
            json.dump(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, self.path)

    def _read(self) -> list[Trial]:
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            version, identity = content["format"], content["identity"]
            trials = [Trial.from_dict(trial) for trial in content["trials"]] if version == FORMAT else []
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise self._error(f"no comparison ({type(error).__name__}: {error})") from error
        if version != FORMAT:
            raise self._error(f"format {version!r} instead of {FORMAT}")
        changed = sorted(key for key in {*identity, *self.identity} if identity.get(key) != self.identity.get(key))
        if changed:
            raise self._error(f"a comparison with other {', '.join(changed)}")
        return trials

    def _error(self, found: str) -> QuambaError:
        return QuambaError(
            f"found {found} in {str(self.path)!r}; expected the state of this comparison: name another file with "
            "--state, or start anew with --restart"
        )
