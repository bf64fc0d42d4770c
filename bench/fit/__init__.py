"""Does it fit? The verb `plan`: the memory of a training step that is never computed.

Read `lifetimes` (what a step makes, and when it lets go of it), `allocator` (what CUDA's would
reserve), `subject` (of which model), `training` (the step; `cuda_autocast`), `peaks` (from two
steps to every batch), `variant` (one process's work), `plans` (all variants, and the cheapest
change), `equal_memory` (the table over all published models), `report`, `figure`, `plan`.
"""
