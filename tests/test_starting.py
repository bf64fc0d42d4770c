"""However the tests are started: kernels are interpreted, and what waits for ever fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

OPERATOR = Path(__file__).parent / "kernels" / "test_operator.py"


@pytest.mark.slow
def test_a_file_that_is_started_alone_from_another_folder_is_interpreted(tmp_path: Path) -> None:
    """The conftest of its folder imports the kernels before any hook is called."""
    pytest.importorskip("triton")
    environ = {
        k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "PYTEST_ADDOPTS")
    }
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", OPERATOR, "-k", "test_layout_of_volumes_is_kept"],
        cwd=tmp_path,
        env=environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "4 passed" in done.stdout  # in ATen and in three tiers


def test_a_test_that_waits_for_ever_fails() -> None:
    left, _ = signal.getitimer(signal.ITIMER_REAL)
    assert 0 < left <= 600
    with pytest.raises(pytest.fail.Exception, match="not done after 600 s"):
        signal.raise_signal(signal.SIGALRM)
