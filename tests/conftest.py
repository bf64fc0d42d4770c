"""Set before anything imports the kernels: Triton reads it when a kernel is defined.

The tests in tests/gpu want compiled kernels; `make test-gpu` sets it to 0 beforehand.
"""

import os
import sys
from pathlib import Path

# Faulty implementations, for this process and for those that it starts.
FAULTS = str(Path(__file__).parent / "faults")
sys.path.append(FAULTS)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), FAULTS]))

os.environ.setdefault("TRITON_INTERPRET", "1")
