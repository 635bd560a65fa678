"""Live comparisons share the machine with one another."""

import contextlib

with contextlib.suppress(ImportError):
    import torch

    torch.set_num_threads(1)
