"""llama.cpp, through the C functions that llama-cpp-python binds."""

import ctypes
import os
from typing import Any

import llama_cpp
import numpy as np
from worker import Settings

PACKAGES = ("llama-cpp-python",)


@llama_cpp.llama_log_callback
def silent(*_: Any) -> None:
    """Its log, which is long."""


llama_cpp.llama_log_set(silent, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()


class Llama:
    """One context for each number of rows, each row a sequence of it."""

    def __init__(self, settings: Settings):
        self.settings = settings
        path = settings.path.encode()
        parameters = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(path, parameters)
        if not self.model:
            raise ValueError(f"llama.cpp cannot load {settings.path!r}")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.vocabulary_size = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self.longest = max(settings.prefill, settings.prompt)
        self.batch = llama_cpp.llama_batch_init(self.longest, 0, settings.rows)
        self.contexts: dict[int, Any] = {}
        self.context(1)

    def context(self, rows: int) -> Any:
        if rows not in self.contexts:
            parameters = llama_cpp.llama_context_default_params()
            room = max(self.settings.prefill, self.settings.prompt + self.settings.new)
            parameters.n_ctx = room * rows
            parameters.n_batch = parameters.n_ubatch = self.longest
            parameters.n_threads = parameters.n_threads_batch = os.cpu_count() or 1
            parameters.n_seq_max = rows
            context = llama_cpp.llama_init_from_model(self.model, parameters)
            if not context:
                raise ValueError(f"llama.cpp makes no context of {rows} rows of {room} tokens")
            self.contexts[rows] = context
        return self.contexts[rows]

    def decode(self, context: Any, entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Runs (token, position, row, wanted) and takes the likeliest token of each wanted one."""
        self.batch.n_tokens = len(entries)
        for place, (token, position, row, wanted) in enumerate(entries):
            self.batch.token[place] = token
            self.batch.pos[place] = position
            self.batch.n_seq_id[place] = 1
            self.batch.seq_id[place][0] = row
            self.batch.logits[place] = wanted
        if status := llama_cpp.llama_decode(context, self.batch):
            raise RuntimeError(f"llama_decode returned {status}")
        return [self.likeliest(context, place) for place, entry in enumerate(entries) if entry[-1]]

    def likeliest(self, context: Any, place: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, place)
        return int(np.ctypeslib.as_array(logits, shape=(self.vocabulary_size,)).argmax())

    def prefill(self, ids_BT: np.ndarray) -> list[int]:
        context = self.context(len(ids_BT))
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        last = ids_BT.shape[1] - 1
        tokens = []
        for row, ids in enumerate(ids_BT.tolist()):
            entries = [(token, place, row, place == last) for place, token in enumerate(ids)]
            tokens += self.decode(context, entries)
        return tokens

    def first(self, ids_BT: np.ndarray, new: int) -> list[int]:
        return self.prefill(ids_BT)

    def generate(self, ids_BT: np.ndarray, new: int) -> np.ndarray:
        rows, prompt = ids_BT.shape
        chosen = [self.prefill(ids_BT)]
        for position in range(prompt, prompt + new - 1):
            entries = [(token, position, row, True) for row, token in enumerate(chosen[-1])]
            chosen.append(self.decode(self.context(rows), entries))
        return np.array(chosen).T


def load(settings: Settings) -> Llama:
    return Llama(settings)
