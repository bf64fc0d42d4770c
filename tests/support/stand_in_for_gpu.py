"""Stands in for Python on a machine with a GPU: whatever a step runs, it leaves what that would.

It is started with the words of a step, and told by the file in STAND_IN what goes wrong in which.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

REFUSED = "Triton Error [CUDA]: too many resources requested for launch"
ILLEGAL = "CUDA error: an illegal memory access was encountered"
NO_ROOM = "its output cannot be written (No space left on device): make room for it"
NO_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB"


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1] if name in words else ""


def step_of(words: list[str]) -> str:
    """The name of the step whose command this is."""
    if "pytest" in words:
        kept = option(words, "-k")
        return {"ticket": "tests-tickets"}.get(
            kept, "tests-rest" if kept.startswith("not") else "tests-many"
        )
    if "plan" in words:
        return Path(option(words, "--json")).stem
    if "run" in words or words[1].endswith("operators"):
        return Path(option(words, "--output")).stem
    return words[1].rpartition(".")[2] if words[1].endswith("launches") else words[2]


def main(words: list[str]) -> int:
    told = json.loads(Path(os.environ["STAND_IN"]).read_text())
    step = step_of(words)
    fault = told["seeds"].get(step, "")
    output = Path(option(words, "--output") or option(words, "--json"))
    if fault == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(1000)
    if fault == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "refused":
        print(f"C forward nchw bf16: RuntimeError: {REFUSED}")
        print("95 launches are right, 0 wrong, 1 failed")
        return 3
    if fault == "illegal":
        print(f"RuntimeError: {ILLEGAL}\nCompile with `TORCH_USE_CUDA_DSA`")
        return 1
    if fault == "missing module":
        print("ModuleNotFoundError: No module named 'scipy'")
        return 1
    if fault == "out of memory":
        print(f"torch.OutOfMemoryError: {NO_MEMORY}")
        return 3
    full = Path(told["full"])
    if fault == "full disk" and not full.with_suffix(".seen").exists():
        full.touch()
        full.with_suffix(".seen").touch()
        print(f"resblock-bench: ended before it was done, since {NO_ROOM}")
        return 3
    if words[1].endswith("operators"):
        return operators(output, told["operators"], fault)
    if "run" in words:
        template = told["runs"].get(fault, told["runs"][""])
        shutil.copytree(template, output, dirs_exist_ok=True)
    elif "plan" in words:
        shutil.copy(told["plan"], output)
    elif "tune" in words:
        shutil.copy(told["table"], output)
    print(f"{step} is done")
    return 5 if fault == "wrong" else 0


def operators(output: Path, rows: list[str], fault: str) -> int:
    """A row at once; what breaks the GPU at the first one is left out by the next call."""
    begun = output.exists()
    with output.open("a") as file:
        if fault == "breaks the GPU" and not begun:
            file.write(json.dumps({**json.loads(rows[0]), "status": "begun"}) + "\n")
            file.flush()
            print(f"RuntimeError: {ILLEGAL}", flush=True)
            os.abort()
        for text in rows[int(begun) :]:
            row = json.loads(text)
            if fault == "NaN":
                row |= {"status": "wrong", "reason": "dx has a relative error of nan"}
            file.write(json.dumps(row) + "\n")
    print("done")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
