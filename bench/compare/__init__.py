"""The verbs `compare` and `calibrate`: is it slower?

`comparison` takes rounds until `verdict` can tell, with the tolerance of a `calibration`;
`source_tree` checks the base revision out; `stored` compares run folders.
"""
