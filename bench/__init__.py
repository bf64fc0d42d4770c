"""Measures and compares the blocks of `reference` and `kernels`.

Rooms, each of which imports only from those listed before it:

    machine    the machine that measures: hardware, driver, processes
    measure    one cell in, one row out; all that can change a number
    grid       which cells there are to measure
    lockstep   several processes, measured in turns
    runs       a run folder: written, read, shown
    profile    where a step's time and memory go: the verb `profile`
    report     a run as one page: the verb `report`, and what `run` leaves beside its rows
    fit        does a training step fit? the verb `plan`
    compiled   what a kernel is on a GPU that is absent: bytes, machine code
    cost       what a call costs there: the verb `cost`, predicted times, the host's time
    sweep      the verb `run`: cells become rows, by an engine
    findings   what is not as expected, and how it is reported
    compare    is it slower? the verbs `compare` and `calibrate`
    tune       which launch is fastest? the verb `tune`
    gate       expected against found: the verbs `check` and `baseline`
    gpu        the verbs `gpu-results` and `gpu-report`: all of the above on a GPU, whatever fails
    cli        the command line

Every room may import the modules that lie beside the rooms: `records` (the schema of what is
written), `errors`, `exitcodes`, `units`, `terminal`, `progress`, `markdown`, `files`, `checkout`,
`offers`.
No room imports `plugins`, which has the few names that other packages may.
"""
