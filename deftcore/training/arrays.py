"""Arrays from files of others."""

import numpy as np


def as_text(values: np.ndarray) -> np.ndarray:
    """Text as text where a file has it as bytes in UTF-8, as HDF5's and C's do; other arrays as they are.

    >>> as_text(np.array([b"wheat", b"barley"])).tolist()
    ['wheat', 'barley']
    """
    if values.dtype.kind == "S":
        return np.char.decode(values, "utf-8")
    if values.dtype.kind != "O":
        return values
    decoded = [value.decode() if isinstance(value, bytes) else value for value in values.flat]
    return np.array(decoded).reshape(values.shape)
