"""The verb `tune`: which launch is fastest on this GPU? `choices` lists them for each bucket of
problems, `bucket` measures one, `gpu` runs and times."""
