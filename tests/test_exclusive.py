"""Files that one run at a time goes on from."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pyllm.errors import FileError
from pyllm.exclusive import alone

OTHER = """
import sys
from pathlib import Path
from pyllm.exclusive import alone

with alone(Path(sys.argv[1])):
    {}
"""


def other_run(path: Path, what: str = "pass") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", OTHER.format(what), str(path)], capture_output=True, text=True
    )


def test_another_run_is_kept_out_until_this_one_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    with alone(path):
        refused = other_run(path)
        assert refused.returncode != 0
        assert "rows.json: another run is writing it" in refused.stderr
        assert other_run(tmp_path / "others.json").returncode == 0
        link = tmp_path / "link.json"
        link.symlink_to(path)
        with pytest.raises(FileError, match=r"link\.json: another run"), alone(link):
            pass
    assert other_run(path).returncode == 0
    assert list(tmp_path.iterdir()) == [link]


def test_a_run_that_was_killed_keeps_nobody(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    assert other_run(path, "import os; os.kill(os.getpid(), 9)").returncode == -9
    with alone(path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "rows.json"
    with pytest.raises(FileError, match=r"\.rows\.json\.lock: cannot be written: No such file"), alone(path):
        pass
