"""Set before anything imports the kernels: Triton reads it when a kernel is defined.

The tests in tests/gpu want compiled kernels; `make test-gpu` sets it to 0 beforehand.
"""

import os

os.environ.setdefault("TRITON_INTERPRET", "1")
