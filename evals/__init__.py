"""Studies (arms x measures x seeds), their records, statistics, tables and figures, and the command line.

Read in this order: `study` (the YAML file) and `data`; `arms` and `running.plan` (what there is to do); `measures.measure` (the seam) and one
measure, such as `measures.knowledge`; `running.jobs` and `running.runner`; `results.summary`. The file map is in README.md. Nothing is imported
here, so that `--help` is quick.
"""
