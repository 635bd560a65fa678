"""Commands that have to refuse what they are given."""

import io
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything in a folder, with sizes and times of change."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            about = os.lstat(os.path.join(place, name))
            found[os.path.relpath(os.path.join(place, name), folder)] = (
                about.st_size,
                about.st_mtime_ns,
            )
    return found


class Refusals:
    """Runs commands in this process, in a folder of their own."""

    def __init__(self, place: Path, monkeypatch: pytest.MonkeyPatch, capfd):
        self.place, self._monkeypatch, self._capfd = place, monkeypatch, capfd

    def __call__(
        self, entry: Callable[[], None], *arguments: object, stdin: str = "", status: int = 1
    ) -> str:
        """What a command says when it refuses: one error, no traceback, and nothing is changed in
        the folder.
        """
        self._monkeypatch.setattr(sys, "argv", ["phi3", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        before = tree(self.place)
        self._capfd.readouterr()
        with pytest.raises(SystemExit) as stop:
            entry()
        out, err = self._capfd.readouterr()
        assert stop.value.code == status, err
        assert tree(self.place) == before
        assert out == "" and "Traceback" not in err
        if status == 1:
            assert err.count("error: ") == 1, err
            err = err[err.index("error: ") :]
            assert len(err) < 3000, f"{len(err)} characters: {err[:3000]}"
        return err


@pytest.fixture
def refused(tmp_path, monkeypatch, capfd):
    """Refusals in an empty folder."""
    return Refusals(tmp_path, monkeypatch, capfd)
