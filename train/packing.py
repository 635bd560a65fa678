"""Documents laid into rows of one length."""

from typing import NamedTuple

import numpy as np

# Rows that are filled at a time. More fill hardly better.
OPEN_ROWS = 64


class Packing(NamedTuple):
    """Which documents a row holds.

    Attributes:
      order: int64 [n], the documents, row by row.
      starts: int64 [rows + 1], where each row begins in order, and the end.
    """

    order: np.ndarray
    starts: np.ndarray

    @property
    def rows(self) -> int:
        return len(self.starts) - 1

    def documents(self, row: int) -> np.ndarray:
        """The documents of a row, int64."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def one_a_row(documents: int) -> Packing:
    """Each document in a row of its own."""
    return Packing(np.arange(documents), np.arange(documents + 1))


def best_fit(lengths: np.ndarray, capacity: int) -> Packing:
    """Each document, in its order, in the open row that it leaves the least room in.

    Where none has room, the fullest is closed and a new one takes its place. Rows are numbered as
    they were opened.

    Args:
      lengths: int [n], from 1 to capacity.
      capacity: tokens a row.
    """
    rooms = np.zeros(OPEN_ROWS, np.int64)
    numbers = np.zeros(OPEN_ROWS, np.int64)
    row_of = np.empty(len(lengths), np.int64)
    opened = 0
    for document, length in enumerate(lengths.tolist()):
        place = np.where(rooms < length, capacity + 1, rooms).argmin()
        if rooms[place] < length:
            place = rooms.argmin()
            rooms[place], numbers[place] = capacity, opened
            opened += 1
        rooms[place] -= length
        row_of[document] = numbers[place]
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=opened))])
    return Packing(np.argsort(row_of, kind="stable"), starts)
