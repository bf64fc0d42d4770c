"""The page that people open: the verb `report`, and what `run` leaves beside its rows.

`headline` says how variants stand to the reference, `content` what a page says of a run, `again` by
which command it is measured again, `predicted` what memory was to be expected, `profiled` what the
profiles in its folder say; `inline` makes matplotlib's figures parts of the page, which `page` puts
together from page.html, page.css and page.js. `derived` has a run write its tables, figures and
page."""
