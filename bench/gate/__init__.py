"""The verbs `check` and `baseline`: what was found, against what is expected.

`check` runs the parts (`static`, `memory`, `accuracy`, `timing`); `pins` are the expected values,
in files that people read; `baseline` saves and shows them.
"""
