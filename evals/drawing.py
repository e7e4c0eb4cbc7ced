"""How pictures are kept: drawn without a screen, and the same bytes for the same numbers."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from proxytune.files import check_writable
from proxytune.printable import printable

matplotlib.rcParams["text.parse_math"] = False  # a dollar sign in a name begins no formula


def save(figure: Figure, path: Path) -> Path:
    check_writable(path, "out")
    figure.savefig(path, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return path


def drawn_name(name: str) -> str:
    """A name as it can stand in a picture; a legend leaves out what begins with an underscore."""
    return f" {printable(name)}" if name.startswith("_") else printable(name)
