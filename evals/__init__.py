"""Studies (arms x measures x seeds), their records, statistics, tables and figures, and the command line.

Read in this order: `study` (the YAML file), `data` and `arms` (what it asks for), `running.plan`, `running.jobs` and `running.runner` (how it
is run), `records`, `measures` (what is recorded and concluded), `statistics`, `results` and `display`. Independent of these are the commands
`tune`, `generate` and `bench`, `harness` (lm-eval), and `released` with `sandbox`. Nothing is imported here, so that `--help` is fast. See
README.md for the file map.
"""
