"""Step 2: reward sources. Texts in, one float per answer out; `source` calls and checks, `sentiment` is built in."""
