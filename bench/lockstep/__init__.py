"""Several processes measured in turns, so that what the machine does falls on all of them.

`side` is such a process and `sides` what starts it, in `orders` they talk; `rounds` are taken of
them on a `testbed` that holds the machine, disturbed ones again.
"""
