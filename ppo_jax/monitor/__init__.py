"""What is watched: `metrics` (the numbers), `invariants` (what must hold), `samples` (fixed prompts), `sinks` and
`console` (where it all goes)."""
