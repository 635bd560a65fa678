"""What a decoding step holds and sends on H100s, by the GPU's compiler (jax 0.10.2)."""

import pytest
from compiler_jobs import MINI, Job

from plan.hlo import count, read


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 4)])
@pytest.mark.parametrize("program", ["step", "loop"])
def test_the_cache_is_not_copied(gpu_mesh, shape, program):
    """Of two layers and 8 rows of 4096 slots: whole, or of 4 rows and 8 heads a device."""
    job = Job(gpu_mesh(shape), MINI, 2, rows=8)
    compiled = getattr(job, program)()
    cache = job.cache.k_LBKSH.sharding.shard_shape(job.cache.k_LBKSH.shape)
    assert cache == (2, 8 // shape[0], 32 // shape[2], 4096, 96)
    # A copy would be 0.75 GiB, or 0.09.
    assert job.above(compiled) < (0.2 if shape == (1, 1, 1) else 0.05)
    # The products' sums alone; the cache would be gathered by an all-gather.
    kinds = count(read(compiled.as_text()).collectives, depth=1 if program == "step" else 2)
    assert kinds == ({} if shape == (1, 1, 1) else {"all-reduce": 2})
