"""The verbs `gpu-results` and `gpu-report`: all that is worth measuring on a GPU, in one command.

`parts` says what is measured, as data, and `estimates` how long a `run` of it takes; `steps` runs
it, step by step, and `outcomes` keeps what became of each. `launches` is a small program that
launches every kernel once, for a sanitizer; `operators` measures the operator at published sites.
`results` reads what was left, `beside` holds it against what was predicted, and `report` writes
docs/gpu.md.
"""
