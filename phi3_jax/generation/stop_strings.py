"""Stop strings inside the compiled step, wherever the borders of tokens fall.

The strings become an automaton over bytes (Aho and Corasick, "Efficient string matching", 1975):
its state is the longest end of the text so far that begins a stop string. Running every token's
bytes through it from every state, once and on the host, gives a table with which a step costs one
look-up a row.
"""

import functools
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

# States are numbered from 0 in int16, and a table has states x vocabulary entries.
_MAX_BYTES = 4095


@flax.struct.dataclass
class StopStrings:
    """Stop strings as a compiled step sees them.

    Attributes:
      next_QV: int16, the state after token v in state q, or -1 - that state where a stop string
        ends inside the token. Q is a power of two of at least 64, so that other strings of much
        the same length compile nothing.
    """

    next_QV: np.ndarray | jax.Array

    @classmethod
    def of(cls, stop_strings: Sequence[str] | str, token_bytes: Sequence[bytes]) -> "StopStrings":
        """The table for strings and a vocabulary, made once for each pair of them.

        Args:
          stop_strings: one string or several.
          token_bytes: the UTF-8 of every id inside a text, b"" where it has none
            (`Tokenizer.token_bytes`).

        Raises:
          ValueError: without strings, for an empty one, and for more than 4095 bytes of them.
        """
        strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not strings or not all(isinstance(string, str) and string for string in strings):
            raise ValueError(
                f"stop_strings is {stop_strings!r}, must be a string or a list of strings, none of "
                "them empty"
            )
        patterns = [string.encode("utf-8") for string in strings]
        if (total := sum(map(len, patterns))) > _MAX_BYTES:
            raise ValueError(
                f"stop_strings have {total} bytes together, more than {_MAX_BYTES}; a part of each "
                "stops as well"
            )
        return cls(_table(tuple(patterns), tuple(token_bytes)))

    def start(self, input_ids: np.ndarray, attention_mask: np.ndarray) -> np.ndarray:
        """The states behind prompts, on the host, since a match may begin there: int32 [B].

        Args:
          input_ids: int32 [B, T].
          attention_mask: bool [B, T], False for padding.
        """
        next_QV = np.asarray(self.next_QV)
        # Tokens without text leave every state as it is, of the others one is enough a state.
        text_V = (next_QV[0] != 0) | (next_QV[1] != 1)
        state_B = np.zeros(len(input_ids), np.int32)
        for row, ids in enumerate(input_ids):
            for token in ids[attention_mask[row] & text_V[ids]][-len(next_QV) :]:
                state = next_QV[state_B[row], token]
                state_B[row] = max(state, -1 - state)
        return state_B

    def advance(self, state_B: jax.Array, token_B: jax.Array) -> tuple[jax.Array, jax.Array]:
        """One token more of every row: the states after it, and whether it ends a stop string.

        The token may go on behind the stop string (StopStringCriteria).
        """
        next_B = jnp.asarray(self.next_QV)[state_B, token_B].astype(jnp.int32)
        return jnp.maximum(next_B, -1 - next_B), next_B < 0


def _automaton(patterns: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The next state of each state and byte, int16 [Q, 256]; where a pattern ends, bool [Q]."""
    children: list[dict[int, int]] = [{}]
    ends = set()
    for pattern in patterns:
        state = 0
        for byte in pattern:
            if byte not in children[state]:
                children[state][byte] = len(children)
                children.append({})
            state = children[state][byte]
        ends.add(state)
    next_QC = np.zeros((len(children), 256), np.int16)
    ends_Q = np.isin(np.arange(len(children)), list(ends))
    # Breadth first: the state to fall back to is less deep, so its row is complete already.
    queue, fallback = [0], {0: 0}
    for state in queue:
        row = next_QC[fallback[state]].copy()
        ends_Q[state] |= ends_Q[fallback[state]]
        for byte, child in children[state].items():
            fallback[child] = int(row[byte])
            row[byte] = child
            queue.append(child)
        next_QC[state] = row
    return next_QC, ends_Q


@functools.lru_cache(maxsize=4)
def _table(patterns: tuple[bytes, ...], token_bytes: tuple[bytes, ...]) -> np.ndarray:
    next_QC, ends_Q = _automaton(patterns)
    text = np.frombuffer(b"".join(token_bytes), np.uint8)
    length_V = np.fromiter(map(len, token_bytes), np.int64, len(token_bytes))
    # Long tokens first: those that are still being read are always the first ones.
    order = np.argsort(-length_V, kind="stable")
    begin, length = (np.cumsum(length_V) - length_V)[order], length_V[order]

    def run(state: int, tokens: np.ndarray) -> np.ndarray:
        """What tokens, indices into `order` that ascend, lead to from a state."""
        states, stopped = np.full(len(tokens), state, np.int16), np.zeros(len(tokens), bool)
        begins, ending = begin[tokens], length[tokens]
        for offset in range(ending[0] if len(tokens) else 0):
            reading = slice(np.searchsorted(-ending, -offset))
            states[reading] = next_QC[states[reading], text[begins[reading] + offset]]
            stopped[reading] |= ends_Q[states[reading]]
        return np.where(stopped, -1 - states, states)

    states = len(next_QC)
    padded = max(64, 1 << (states - 1).bit_length())
    next_QV = np.zeros((padded, len(order)), np.int16)
    root = run(0, np.arange(len(order)))
    textless = order[length == 0]
    first = text[begin[length > 0]]
    for state in range(states):
        row = root.copy()
        # A token whose first byte does not go on with the text before it leads where it does
        # from the beginning.
        on = np.flatnonzero(next_QC[state, first] != next_QC[0, first])
        row[on] = run(state, on)
        next_QV[state, order] = row
        next_QV[state, textless] = state
    next_QV.flags.writeable = False  # it is shared by all who ask for it
    return next_QV
