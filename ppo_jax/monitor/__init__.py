"""What is watched: `metrics` (the numbers), `invariants` (what must hold), `samples` (fixed prompts), `answers` (a few
of ordinary iterations), `sinks` and `console` (where it all goes)."""
