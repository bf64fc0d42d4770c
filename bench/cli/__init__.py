"""The command line: `main` has the verbs, with those of the gate in `gate` and those of a GPU's
results in `gpu`; `app` what they share, `listing` what `list` and `env` show."""
