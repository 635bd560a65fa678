"""The batches of a run, each made from its number alone.

A run's rows are one long stream: epoch after epoch, each with its documents in another order and
packed anew. Step s takes batch_size rows from row s * batch_size on, so that the number of a step
is all there is to save, whatever the processes and devices.
"""

import array
import functools
import hashlib
import threading
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import grain
import numpy as np

import phi3_jax as phi3
from phi3_jax.loss import IGNORED_LABEL
from train.config import DataConfig
from train.data_cache import DataCache
from train.examples import Example, make_example
from train.packing import Packing, best_fit, one_a_row
from train.records import Records

# Bad records that an error names one by one.
_NAMED = 1000
# Records between two calls of progress; as many are held in memory.
_AT_ONCE = 1000
_PREFETCH = grain.ReadOptions(num_threads=4, prefetch_buffer_size=8)


class Batches:
    """Documents in rows, rows in batches.

    All records are read and tokenised once at the beginning, which finds the bad ones and tells the
    lengths; later a document is made again when its row is.

    Args:
      records: the data.
      tokenizer: of the model.
      data: how documents are made and laid into rows.
      batch_size: rows a step, over all processes and parts.
      accumulate: A, the parts of a step; each has B = batch_size // A rows.
      seed: of the order.
      epochs: how often each document comes; None: without end.
      shuffle: a new order each epoch, else that of the data.
      progress: called now and then with the number of records read and that of all.
      cache: what an earlier start has found in the same data, so that it is not read again.

    Attributes:
      documents: how many an epoch has.
      dropped: numbers of the records that are longer than a row and left out.
      tokens: of an epoch. learnt_tokens: those that are labels.
      longest: tokens of the longest document, dropped or not.
      rows: of the first epoch; another order may need another number.
      steps: that the epochs make, the last one filled up with empty rows; None: without end.
      fingerprint: changes with the tokens, their order and the sizes; equal ones make the same
        global batches. Neither accumulate, epochs nor processes matter to it.

    Raises:
      ValueError: naming all records that are bad; where all are too long.
    """

    def __init__(
        self,
        records: Records,
        tokenizer: phi3.Tokenizer,
        data: DataConfig,
        batch_size: int,
        accumulate: int,
        seed: int,
        epochs: int | None,
        shuffle: bool = True,
        progress: Callable[[int, int], None] | None = None,
        cache: DataCache | None = None,
    ):
        self._records, self._tokenizer, self._data = records, tokenizer, data
        self._parts, self._rows_a_part = accumulate, batch_size // accumulate
        self._seed, self._shuffle = seed, shuffle
        found = None if cache is None else cache.load()
        self._unsaved = cache if found is None else None
        self._found = self._read(progress) if found is None else found
        self._lengths = self._found["lengths"]
        self._record, self._start, self._stop = self._found["pieces"].T
        self.dropped: list[int] = self._found["dropped"].tolist()
        self.learnt_tokens = int(self._found["learnt_tokens"])
        self.longest = int(self._lengths.max())
        self.documents = len(np.unique(self._record))
        self.tokens = int((self._stop - self._start).sum())
        self._packing = functools.lru_cache(maxsize=4)(self._pack)
        self._example = functools.lru_cache(maxsize=16)(self._make)
        self._ends = [0]  # of the epochs in the stream, as far as they were asked for
        self._lock = threading.Lock()
        self.rows = self._end_of(0)
        self._last = None if epochs is None else self._end_of(epochs - 1)
        self.steps = None if self._last is None else -(-self._last // batch_size)
        sizes = (seed, shuffle, batch_size, data.sequence_length, data.packing)
        told = f"{self._found['digest']} {sizes}"
        self.fingerprint = hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    # --- Reading all, once -------------------------------------------------------------------

    def save_cache(self) -> None:
        """Keeps what was found for the next start; the folder of the cache must be there."""
        if self._unsaved is not None:
            self._unsaved.save(self._found)
            self._unsaved = None

    def _read(self, progress: Callable[[int, int], None] | None) -> dict[str, np.ndarray]:
        """What is known of the documents.

        Returns:
          lengths, of each record's document; pieces, int64 [n, 3], each what lies in a row as one:
          record, start and stop; dropped; learnt_tokens; digest, of all ids and pieces.
        """
        records, row = self._records, self._data.sequence_length
        content = hashlib.blake2b(digest_size=16)
        lengths = np.zeros(len(records), np.int64)
        dropped: list[int] = []
        learnt_tokens = 0
        bad: list[str] = []
        pieces = array.array("q")
        for index, example in enumerate(self._examples(progress)):
            if isinstance(example, ValueError):
                bad.append(f"{records.where(index)}: {example}" if len(bad) < _NAMED else "")
                continue
            lengths[index] = length = len(example.ids)
            content.update(example.ids.tobytes() + example.learnt.tobytes())
            if length > row and self._data.long_documents == "drop":
                dropped.append(index)
                continue
            for start in range(0, length, row):
                # The first token of a piece is predicted by none.
                if count := int(example.learnt[start + 1 : start + row].sum()):
                    pieces.extend((index, start, min(start + row, length)))
                    learnt_tokens += count
        if bad:
            more = f"\nand {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
            raise ValueError(
                f"{len(bad)} of {len(records)} records cannot be learnt from; mend or remove them:"
                "\n" + "\n".join(bad[:_NAMED]) + more
            )
        if not pieces:
            raise ValueError(
                f"all {len(records)} documents are longer than data.sequence_length {row}, the "
                f"longest has {lengths.max()} tokens; take longer rows, or "
                "data.long_documents=split"
            )
        content.update(pieces)
        return {
            "lengths": lengths,
            "pieces": np.array(pieces, np.int64).reshape(-1, 3),
            "dropped": np.array(dropped, np.int64),
            "learnt_tokens": np.array(learnt_tokens),
            "digest": np.array(content.hexdigest()),
        }

    def _examples(
        self, progress: Callable[[int, int], None] | None
    ) -> Iterator[Example | ValueError]:
        """The documents in their order, or why a record is none."""

        def make(index: int) -> Example | ValueError:
            try:
                return make_example(self._records[index], self._tokenizer, self._data.mask_prompt)
            except ValueError as error:
                return error

        with ThreadPoolExecutor() as threads:
            for start in range(0, len(self._records), _AT_ONCE):
                stop = min(start + _AT_ONCE, len(self._records))
                yield from threads.map(make, range(start, stop))
                if progress is not None:
                    progress(stop, len(self._records))

    # --- Epochs ------------------------------------------------------------------------------

    def _pack(self, epoch: int) -> Packing:
        """The pieces of an epoch in rows."""
        order = np.arange(len(self._record))
        if self._shuffle:
            # Bits of Philox are the same in every version of numpy, permutations need not be.
            # Pieces of a document stay together, so that it need not be made for each anew.
            key = (epoch << 64) + self._seed % (1 << 64)
            bits = np.random.Philox(key=key).random_raw(len(self._records))
            order = np.argsort(bits[self._record], kind="stable")
        if self._data.packing:
            lengths = (self._stop - self._start)[order]
            packing = best_fit(lengths, self._data.sequence_length)
        else:
            packing = one_a_row(len(order))
        return packing._replace(order=order[packing.order])

    def _end_of(self, epoch: int) -> int:
        """The row of the stream that an epoch ends before."""
        while len(self._ends) < epoch + 2:
            packing = self._packing(len(self._ends) - 1)
            self._ends.append(self._ends[-1] + packing.rows)
        return self._ends[epoch + 1]

    def _pieces(self, row: int) -> np.ndarray:
        """The pieces in a row of the stream; none past the last epoch."""
        if self._last is not None and row >= self._last:
            return np.zeros(0, np.int64)
        with self._lock:  # so that of several threads one packs
            while self._ends[-1] <= row:
                self._end_of(len(self._ends) - 1)
            epoch = bisect_right(self._ends, row) - 1
            return self._packing(epoch).documents(row - self._ends[epoch])

    # --- Batches -----------------------------------------------------------------------------

    def batch(self, step: int, rows: Sequence[int] | np.ndarray) -> dict[str, np.ndarray]:
        """What a process holds of a step: row r of part a is row s*A*B + a*B + r of the stream.

        Args:
          step: s, from 0.
          rows: the numbers r of the rows, each below B.

        Returns:
          input_ids; labels, the same ids, and -100 on what is not learnt, on the first token of
          each document and on padding; segment_ids, 1, 2, ... for the documents of a row, and 0 on
          padding. int32 [A, len(rows), T] each.

        Raises:
          ValueError: where a record is no longer what it was at the beginning.
        """
        shape = (self._parts, len(rows), self._data.sequence_length)
        input_ids = np.full(shape, self._tokenizer.pad_token_id or 0, np.int32)
        labels = np.full(shape, IGNORED_LABEL, np.int32)
        segment_ids = np.zeros(shape, np.int32)
        for part, place in np.ndindex(shape[:2]):
            row = (step * self._parts + part) * self._rows_a_part + int(rows[place])
            column = 0
            for segment, piece in enumerate(self._pieces(row).tolist(), start=1):
                example = self._example(int(self._record[piece]))
                cut = slice(self._start[piece], self._stop[piece])
                ids, learnt = example.ids[cut], example.learnt[cut]
                own = (part, place, slice(column, column + len(ids)))
                input_ids[own] = ids
                labels[own] = np.where(learnt, ids, IGNORED_LABEL)
                labels[part, place, column] = IGNORED_LABEL
                segment_ids[own] = segment
                column += len(ids)
        return {"input_ids": input_ids, "labels": labels, "segment_ids": segment_ids}

    def iterate(
        self, start: int, stop: int, rows: Sequence[int] | np.ndarray
    ) -> Generator[dict[str, np.ndarray]]:
        """The batches of steps start to stop, made ahead in threads; close() ends them."""
        steps = grain.MapDataset.range(start, stop).map(lambda step: self.batch(int(step), rows))
        ahead = iter(steps.to_iter_dataset(_PREFETCH))
        try:
            yield from ahead
        finally:
            ahead.close()

    def _make(self, index: int) -> Example:
        try:
            example = make_example(self._records[index], self._tokenizer, self._data.mask_prompt)
        except ValueError as error:
            raise ValueError(f"{self._records.where(index)} has changed: {error}") from error
        if len(example.ids) != self._lengths[index]:
            raise ValueError(
                f"{self._records.where(index)} has changed: it had {self._lengths[index]} tokens "
                f"when the run began, and has {len(example.ids)}; leave data alone during a run"
            )
        return example

    # --- Telling -----------------------------------------------------------------------------

    def summary(self) -> list[str]:
        """Lines that tell what is learnt from, with one document as an example."""
        row = self._data.sequence_length
        learnt, full = self.learnt_tokens / self.tokens, self.tokens / self.rows / row
        return [
            *(f"from         {file.path}: {len(file):,} records" for file in self._records.files),
            f"documents    {self.documents:,}, the longest of {self.longest:,} tokens",
            f"dropped      {len(self.dropped):,}, longer than {row:,} tokens",
            f"tokens       {self.tokens:,}, of which {learnt:.1%} are learnt",
            f"rows         {self.rows:,} of {row:,} tokens, {full:.1%} full",
            f"for example  {self._marked(int(self._record[0]))}",
        ]

    def _marked(self, index: int, longest: int = 256) -> str:
        """The beginning of a document, with brackets around what is learnt."""
        ids, learnt = (array[:longest] for array in self._example(index))
        cuts = np.flatnonzero(np.diff(learnt)) + 1
        runs = zip(np.split(ids, cuts), np.split(learnt, cuts), strict=True)
        texts = ((self._tokenizer.decode(run), flags[0]) for run, flags in runs)
        shown = "".join(f"[[{text}]]" if learnt else text for text, learnt in texts)
        return shown + (" ..." if self._lengths[index] > longest else "")
