"""A run directory becomes one HTML page: `runs` (what is read), `verdict` (what the numbers say), `curves` and
`drawing` (the charts), `page` (all of it together). Nothing here writes into a run directory."""
