"""How pictures are kept: drawn without a screen, and the same bytes for the same numbers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from proxytune.files import check_writable


def save(figure: Figure, path: Path) -> Path:
    check_writable(path, "out")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path
