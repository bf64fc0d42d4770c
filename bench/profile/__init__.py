"""Where the time and the memory of one step go: the verb `profile`.

Begin with `events`, which says of every nanosecond of a step to which module, pass and group it
belongs (`groups`), and with `work`, which counts the bytes and operations of every operator and
watches its storages, for `memory`. `step` runs both over a checked cell in a process of its own,
and `profiles` is what comes of it. `trace` writes what Perfetto opens, `figures` draws, `shown`
prints, `selecting` finds the cells that are named, and `profile` does all of it.
"""
