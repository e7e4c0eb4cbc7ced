"""Studies (arms x measures x seeds), their records, statistics, tables and figures, and the command line.

Read in this order: `study` (the YAML file) - `material`, `arms`, `measures` (what it asks for) - `selection`, `compare`
(runs it) - `records`, `costs` - `statistics`, `metrics`, `frontier`, `results` (numbers) - `tables`, `figures`, `items`. By
themselves stand `tune`, `generate`, `bench`, `harness` (lm-eval), and `rescore` with `released` and `sandbox`. Nothing is
imported here, so that `--help` is quick.
"""
