"""A temporary folder that is gone with its process."""

import subprocess
import sys
import time
from pathlib import Path

from resblock_bench.bench.machine.scratch import scratch_folder


def test_a_scratch_folder_is_there_and_gone() -> None:
    with scratch_folder() as folder:
        (folder / "truth").write_bytes(b"1")
        assert folder.is_dir()
    assert not folder.exists()


def test_a_scratch_folder_is_gone_after_a_kill() -> None:
    """Also where what the process has started lives on."""
    code = (
        "import subprocess, sys, time\n"
        "from resblock_bench.bench.machine.scratch import scratch_folder\n"
        "with scratch_folder() as folder:\n"
        "    (folder / 'truth').write_bytes(b'1')\n"
        "    subprocess.Popen(['sleep', '60'])\n"
        "    print(folder, flush=True)\n"
        "    time.sleep(1000)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    assert (folder / "truth").exists()
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 60
    while folder.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not folder.exists()
