"""Does it fit? The verb `plan`: the memory of a training step that is never computed.

Read `lifetimes` (what a step makes, and when it lets go of it), `training` (the step), `subject`
(of which model), `peaks` (from two steps to every batch), `variant` (one process's work), then
`plan`. `published` is the table over all published models.
"""
