"""Set before anything imports the kernels: Triton reads it when a kernel is defined."""

import os

os.environ["TRITON_INTERPRET"] = "1"
