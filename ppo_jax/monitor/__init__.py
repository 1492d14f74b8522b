"""What is watched: `metrics`, `signals` and `texts` (the numbers), `failure_scenes` and `alarms` (what they mean),
`invariants` (what must hold), `samples` (fixed prompts), `answers` (a few of ordinary iterations), `sinks` and
`console` (where it all goes)."""
