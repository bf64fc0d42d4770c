"""Several processes measured in turns, so that what the machine does falls on all of them.

A `party` is such a process, and `turns` are what they take. `block` measures the variants of a
block; `rounds` compare two code bases on a `testbed` that holds the machine, disturbed ones again.
"""
