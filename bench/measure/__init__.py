"""One cell in, one row out: all that can change a number, and therefore (with lockstep/) the code
fingerprint.

Begin with `cell`: a cell is made runnable (`workload` of a block, `models` of `networks`, of which
some are `diffusers_model`, `kinds` of both, `implementations`, and `peers`, those of other
projects), checked against float64 (`correctness`), measured (`memory`, `timing` on `devices`,
`cuda_graph`) and held against what the machine allows (`floor`, `ceilings`) and did meanwhile
(`telemetry`, `conditions`). `jobs` is what a process of its own is asked to do. `operator` is what
a block is made faster by, in eager PyTorch: the truth where not a cell but the operator alone is
checked.
"""
