"""The verb `run`: `sweep` opens a run folder and has an engine (`engines`, `ray_engine`) make rows
of its cells; `schedule` decides which is next."""
