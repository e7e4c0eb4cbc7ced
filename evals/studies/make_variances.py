"""Makes variances.json, from which `proxytune compare --plan` says what a study of a shipped world will be able to tell.

    python evals/studies/make_variances.py proxytune-runs/world/results.json [MORE...]

Each argument is the results.json of a study of one world, best with `tuning_seeds` of two or more; the file is written beside this script.
"""

import sys
from pathlib import Path

from evals.results.variance import SHIPPED, excerpt
from proxytune.content import as_json

if __name__ == "__main__":
    found = [excerpt(Path(results)) for results in sys.argv[1:]]
    SHIPPED.write_text(as_json({world: rows for one in found for world, rows in one.items()}) + "\n")
