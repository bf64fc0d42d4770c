"""The command line: `main` has the verbs, with those of the gate in `gate`; `app` what they share,
`listing` what `list` and `env` show."""
