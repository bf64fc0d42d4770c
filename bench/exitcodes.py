"""The exit codes of every verb."""

OK = 0
REGRESSION = 1
TOO_LARGE = 1  # what is planned fits into no device that was asked about
USAGE = 2
INCOMPLETE = 3  # interrupted, out of time budget, a cell failed, or nothing was measured
INCONCLUSIVE = 4
WRONG = 5  # a result differs from the float64 truth by more than its limit
