"""Guided output: text that keeps to a JSON schema, a regular expression or a Lark grammar.

llguidance parses the text so far and says which tokens may come next; the rest of the vocabulary
is masked inside the step. Any split of a text into tokens is allowed, the model chooses between
them.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from phi3_jax.generation.constraints import Rows
from phi3_jax.json_files import parse_json
from phi3_jax.text.tokenizer import Tokenizer

# Between the tokens of JSON: nothing, a space, or a line break and its indentation. A model that
# may write any whitespace can go on with it for ever.
_WHITESPACE = r" |\n[ \t]{0,20}"


class Grammar:
    """What a text has to look like; `generate(..., grammar=...)` keeps to it.

    The new tokens of a row, decoded, are such a text when the row ends with an end token; a row
    that runs out of tokens before is the beginning of one.
    """

    def __init__(self, definition: Mapping[str, str | Mapping[str, Any] | bool]):
        """definition: {"json_schema": ...} or {"lark_grammar": ...}, as llguidance takes it."""
        self._definition = definition
        if error := _llguidance().LLMatcher.validate_grammar(self._source()):
            raise ValueError(f"the grammar is not valid: {error.strip()}")

    @classmethod
    def from_json_schema(cls, schema: Mapping[str, Any] | bool | str) -> "Grammar":
        """JSON by a schema, which is an object or the JSON text of one.

        Between the tokens of the JSON may be a space, or a line break and its indentation;
        "x-guidance" in the schema takes llguidance's own options for that in place of it.

        Raises:
          ValueError: for a schema that is not valid, and for one with keywords that llguidance
            does not know; naming the package where llguidance is not installed.
        """
        if isinstance(schema, str):
            try:
                schema = parse_json(schema)
            except ValueError as error:
                raise ValueError(f"the JSON schema is not JSON: {error}") from None
        if not isinstance(schema, Mapping | bool):
            raise ValueError(f"the JSON schema is a {type(schema).__name__}, must be an object")
        if isinstance(schema, Mapping):
            schema = {"x-guidance": {"whitespace_pattern": _WHITESPACE}, **schema}
        return cls({"json_schema": schema})

    @classmethod
    def from_regex(cls, pattern: str) -> "Grammar":
        """Text that a regular expression matches as a whole, in the syntax of Rust's regex.

        Raises:
          ValueError: for a pattern that is not valid; naming the package where llguidance is not
            installed.
        """
        if not isinstance(pattern, str):
            raise ValueError(
                f"the regular expression is a {type(pattern).__name__}, must be a string"
            )
        source = json.loads(_llguidance().LLMatcher.grammar_from_regex(pattern))
        return cls({"lark_grammar": source["grammars"][0]["lark_grammar"]})

    @classmethod
    def from_lark(cls, grammar: str) -> "Grammar":
        """Text of a context-free grammar in llguidance's variant of Lark; it begins at `start`.

        Raises:
          ValueError: for a grammar that is not valid; naming the package where llguidance is not
            installed.
        """
        if not isinstance(grammar, str):
            raise ValueError(f"the Lark grammar is a {type(grammar).__name__}, must be a string")
        return cls({"lark_grammar": grammar})

    def _source(self, leading_spaces: int = 0) -> str:
        # Tokenizers that drop a text's first space put one before the first word, so there the
        # model's own way to begin has a space.
        start = '%llguidance {"no_forcing": true}\nstart: ' + '" "? ' * leading_spaces + "@text"
        parts = [{"lark_grammar": start}, {"name": "text", **self._definition}]
        return json.dumps({"grammars": parts})

    def constraint(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        eos_token_ids: Sequence[int],
        beams: bool = False,
    ) -> "Guided":
        """The `Constraint` that new tokens keep to this grammar.

        Args:
          tokenizer: of the model.
          vocab_size: ids of the model.
          eos_token_ids: what ends a row, and may come once the text is complete.
          beams: whether the rows are beams; such as cannot go on are then given up.

        Raises:
          ValueError: without end tokens, and for a grammar too large for llguidance.
        """
        ends = tuple(sorted({id for id in eos_token_ids if id < vocab_size}))
        if not ends:
            raise ValueError(
                "a grammar needs an end token, with which a row ends when its text is complete; "
                "give eos_token_id"
            )
        vocabulary = _vocabulary(tokenizer, vocab_size, ends)
        source = self._source(tokenizer.leading_spaces)
        matcher = _llguidance().LLMatcher(vocabulary, source, log_level=0)
        if matcher.is_error():
            raise ValueError(f"the grammar is not valid: {_first_line(matcher.get_error())}")
        return Guided(matcher, vocab_size, ends, beams)


class Guided:
    """The `Constraint` that new tokens keep to a grammar.

    Each row has a parser of its own, which takes back what is no longer in the row and goes on
    from there, so that a step costs one token where rows keep their places.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: Sequence[int], beams: bool):
        self._matcher = matcher  # of an empty text
        self._words = -(-vocab_size // 32)
        self._ends = np.asarray(ends)
        self._beams = beams
        self._rows: list[tuple[Any, np.ndarray]] = []  # each row's parser and what it has parsed

    def allowed(self, sequences: Rows, step: int) -> np.ndarray:
        """As in `Constraint`.

        Raises:
          ValueError: for a token that the grammar does not allow, and where the vocabulary has no
            token to go on with; not for beams.
        """
        while len(self._rows) < len(sequences):
            self._rows.append((self._matcher.deep_copy(), np.empty(0, np.int32)))
        answer_BW = np.zeros((len(sequences), self._words), np.uint32)
        for row, tokens in enumerate(sequences):
            if tokens is None:
                answer_BW[row] = 0xFFFFFFFF
                continue
            new = tokens[len(tokens) - step :]
            if np.isin(new, self._ends).any():
                # A beam that has ended is kept elsewhere, and must not go on.
                answer_BW[row] = 0 if self._beams else 0xFFFFFFFF
                continue
            try:
                answer_BW[row] = self._go_on(row, new)
            except ValueError as error:
                if not self._beams:
                    raise ValueError(f"row {row}: {error}") from None
        return answer_BW

    def _go_on(self, row: int, tokens: np.ndarray) -> np.ndarray:
        matcher, parsed = self._rows[row]
        common = min(len(parsed), len(tokens))
        same = parsed[:common] == tokens[:common]
        common = common if same.all() else int(np.argmin(same))
        matcher.rollback(len(parsed) - common)
        rest = tokens[common:].tolist()
        taken = matcher.try_consume_tokens(rest)
        self._rows[row] = matcher, tokens[: common + taken].copy()
        if taken < len(rest):
            raise ValueError(
                f"the grammar does not allow the token {rest[taken]} that was chosen; another "
                "setting (suppress_tokens, bad_words_ids, a logits processor) forbids all that "
                "the grammar allows"
            )
        bits = np.frombuffer(matcher.compute_bitmask(), "<u4")[: self._words]
        if matcher.is_error():
            # Such a parser stays as it is; the next call begins with a fresh one.
            self._rows[row] = self._matcher.deep_copy(), np.empty(0, np.int32)
            raise ValueError(
                f"there is no token to go on with after {len(tokens)} new ones "
                f"({_first_line(matcher.get_error())}); the vocabulary cannot spell the text, or "
                "the grammar is too complex"
            )
        return bits


def _llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise ValueError(
            "grammars need llguidance, which is not installed: pip install 'phi3-jax[guided]'"
        ) from error
    return llguidance


@functools.lru_cache(maxsize=4)
def _vocabulary(tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]) -> Any:
    """The vocabulary as llguidance has it; ids without text are never allowed there."""
    llguidance = _llguidance()
    words = llguidance.TokenizerWrapper(_Words(tokenizer, vocab_size, ends))
    return llguidance.LLTokenizer(words, eos_token=list(ends))


class _Words:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, ends: tuple[int, ...]):
        self.tokens = list(tokenizer.token_bytes(vocab_size))
        self.eos_token_id, self.bos_token_id = ends[0], None
        # Special tokens are not text, and neither is what ends a row.
        special = {*tokenizer.special_ids, *ends}
        self.special_token_ids = sorted(id for id in special if id < vocab_size)

    def __call__(self, text: str | bytes) -> list[int]:
        # Only asked for where llguidance writes a text itself, which no_forcing forbids.
        raise NotImplementedError


def _first_line(error: str) -> str:
    return error.strip().partition("\n")[0]
