"""Which cells are measured: `axes` and their values, `presets`, `grid` puts them in order, and
`plan` is what one run set out to measure."""
