"""What is watched: `metrics`, `signals` and `texts` (the numbers), `failure_scenes` and `alarms` (what they mean),
`invariants` (what must hold), `samples` (fixed prompts), `sinks` and `console` (where it all goes)."""
