"""Two real processes with four devices each load one folder and generate together."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from reference import config_values, hf_weights, left_padded, params_of, prompts

import phi3_jax as phi3

ROOT = Path(__file__).parent.parent

WORKER = """
import json, sys
import jax
jax.config.update("jax_num_cpu_devices", 4)
jax.config.update("jax_default_matmul_precision", "highest")
jax.config.update("jax_disable_most_optimizations", True)  # compiling is most of the time
process, port, folder = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
import itertools, types
import numpy as np
import phi3_jax as phi3
from phi3_jax.generation import driver, prepare
from phi3_jax.generation.request import stream
from reference import left_padded, prompts
assert jax.device_count() == 8 and jax.local_device_count() == 4
mesh = phi3.make_mesh(data=2, fsdp=2, tensor=2)
model, params = phi3.from_pretrained(folder, mesh=mesh)
ids, mask = left_padded(prompts((7, 12, 16, 15)))  # four rows: each on its own devices
new = dict(max_new_tokens=6, eos_token_id=None)
prompt = (model, params, ids, mask)
greedy = phi3.generate(*prompt, **new).sequences
tokens = greedy[:, ids.shape[1] :]
assert (np.stack(list(stream(*prompt, **new)), axis=1) == tokens).all()
results = [greedy]
if model.config.is_longrope:  # once is enough
    assert (phi3.generate(*prompt, prompt_lookup_num_tokens=3, **new).sequences == greedy).all()
    results.append(phi3.generate(*prompt, num_beams=2, **new).sequences)
    scored = phi3.generate(*prompt, output_scores=True, **{**new, "max_new_tokens": 2})
    assert (np.stack(scored.scores, axis=1).argmax(-1) == tokens[:, :2]).all()
    longer = np.pad(mask, ((0, 0), (0, 2)), constant_values=1)
    further = phi3.generate(
        model, params, scored.sequences, longer, cache=scored.cache, **{**new, "max_new_tokens": 4}
    )
    assert (further.sequences == greedy).all()
    # The first process looks at 0, 1, 2 and 3; the clock of the second stands still.
    seconds = itertools.count() if process == 0 else itertools.repeat(0)
    driver.time = prepare.time = types.SimpleNamespace(monotonic=lambda: next(seconds))
    steps = list(stream(*prompt, max_time=2.5, **new))
    assert (np.stack(steps, axis=1) == tokens[:, :3]).all()
print("RESULT", json.dumps([x.tolist() for x in results]), flush=True)
jax.distributed.shutdown()
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
@pytest.mark.parametrize("case", ["longrope", "mha_window"])
def test_two_processes_generate_what_one_does(case, tmp_path):
    config = phi3.Phi3Config(**config_values(case))
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, case))
    phi3.save_pretrained(tmp_path / "model", model, params)
    ids, mask = left_padded(prompts((7, 12, 16, 15)))
    expected = [
        phi3.generate(
            model, params, ids, mask, max_new_tokens=6, eos_token_id=None, num_beams=beams
        ).sequences
        for beams in ((1, 2) if config.is_longrope else (1,))
    ]

    port = str(free_port())
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(process), port, str(tmp_path / "model")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={"JAX_PLATFORMS": "cpu", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": ""},
        )
        for process in range(2)
    ]
    for worker in workers:
        out, err = worker.communicate(timeout=300)
        assert worker.returncode == 0, err
        line = next(line for line in out.splitlines() if line.startswith("RESULT "))
        np.testing.assert_array_equal(json.loads(line[7:]), expected)
