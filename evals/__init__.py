"""Studies (arms x measures x seeds), their records, statistics, tables and figures, and the command line.

Read in this order: `study` (the YAML file) - `material`, `arms`, `measures` (what it asks for) - `compare` (runs it) -
`records` - `statistics`, `results` (numbers) - `tables`, `figures`. Nothing is imported here, so that `--help` is quick.
"""
