"""Long frames: one value per item for each of many quantities; a quantity's names (metric, site, state, …) are columns of the frame."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd

Names = dict[str, Any]


def long_frame(columns: Iterable[tuple[Names, np.ndarray]]) -> pd.DataFrame:
    """One row for each item of each quantity, quantity after quantity, with the items always in the same order."""
    names, values = zip(*columns, strict=True)
    frame = pd.DataFrame(list(names))
    words = [name for name in frame if isinstance(frame[name].iloc[0], str)]
    frame = frame.astype(dict.fromkeys(words, "category"))
    return frame.loc[frame.index.repeat(len(values[0]))].reset_index(drop=True).assign(value=np.concatenate(values))


def matrix(frame: pd.DataFrame, items: int, **wanted: Any) -> tuple[np.ndarray, pd.DataFrame]:
    """Values [items, quantities] of a long frame with `items` items, and the names of each quantity; only quantities with all `wanted` names."""
    columns = frame.iloc[::items].drop(columns="value").reset_index(drop=True)  # sliced first: the whole frame is large
    chosen = np.ones(len(columns), bool)
    for name, value in wanted.items():
        chosen &= columns[name].isin(list(value) if isinstance(value, list | range | tuple) else [value]).to_numpy()
    values = frame["value"].to_numpy(float).reshape(len(columns), items)
    return np.ascontiguousarray(values[chosen].T), columns[chosen].reset_index(drop=True)
