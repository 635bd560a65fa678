"""The comparison with other ways to run the model, without them."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parent.parent.parent / "benchmarks"
DEMO = SCRIPTS.parent / "phi3_jax" / "tiny_demo"
SMALL = dict(prompt=6, new=16, prefill=9, rows=2, rows_new=8, vocabulary=1000)

MACHINE = {"cpu": "Abacus 9", "cores": 2, "memory_gb": 8.0, "system": "Linux 6", "python": "3.13"}


@pytest.fixture
def parts(monkeypatch):
    """Imports a module of the benchmark by name."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return lambda name: importlib.import_module(f"side_by_side.{name}")


def row(job, number=0, **figures):
    return {"job": job, "round": number, "at": "10:00:00", "wall_s": 1.0, **figures}


def results(*rows, **changes):
    return (
        {"date": "2026-01-31", "machine": MACHINE, "sizes": {}, "skipped": {}}
        | changes
        | {"rows": list(rows)}
    )


def cells(text, figure):
    """The cells of the table's row with this name."""
    line = next(line for line in text.splitlines() if line.startswith(f"| {figure} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


# --- Jobs ------------------------------------------------------------------------------------


def test_rounds_turn_so_that_no_job_always_follows_the_same_one(parts):
    order = parts("jobs").order
    names = ["a", "b", "c", "d"]
    rounds = [order(names, number) for number in range(4)]
    assert rounds[0] == names
    assert all(sorted(turn) == names for turn in rounds)
    before = [turn[turn.index("b") - 1] if turn.index("b") else None for turn in rounds]
    assert len(set(before)) > 1
    assert len({turn[0] for turn in rounds}) > 1


def test_every_job_of_a_round_comes_before_the_next_round(parts):
    jobs = parts("jobs")
    ran = []
    some = [jobs.Job(name, "hf", jobs.Settings("hf")) for name in ("x", "y", "z")]
    jobs.run_rounds(some, 2, lambda job: {"load_s": 1.0}, ran.append)
    assert [line["round"] for line in ran] == [0, 0, 0, 1, 1, 1]
    assert {line["job"] for line in ran[:3]} == {"x", "y", "z"}


def test_names_are_unique_and_each_goal_has_its_jobs(parts, tmp_path):
    names = [job.name for job in parts("jobs").all_jobs(tmp_path, {})]
    assert len(set(names)) == len(names)
    for goal in parts("report").GOALS:
        assert set(goal.ours) <= set(names)
        assert parts("report").peers_of(dict.fromkeys(names), goal.peers), goal.figure


def fake_worker(parts, monkeypatch, tmp_path, text):
    script = tmp_path / "worker.py"
    script.write_text(text)
    monkeypatch.setattr(parts("jobs"), "WORKER", script)


def test_a_worker_that_fails_is_told_with_its_reason_and_the_others_go_on(
    parts, tmp_path, monkeypatch
):
    fake_worker(
        parts,
        monkeypatch,
        tmp_path,
        "import json, sys\n"
        "settings = json.loads(sys.argv[1])\n"
        "if settings['module'] == 'bad': raise ValueError('no such weights')\n"
        "if settings['module'] == 'mute': sys.exit()\n"
        "if settings['module'] == 'slow': import time; time.sleep(60)\n"
        "print('noise')\nprint('RESULT ' + json.dumps({'load_s': 0.25}))\nprint('more')\n",
    )
    jobs, ran = parts("jobs"), {}
    some = [jobs.Job(name, "phi3", jobs.Settings(name)) for name in ("bad", "mute", "slow", "good")]
    jobs.run_rounds(
        some, 1, lambda job: jobs.run_job(job, tmp_path, 5), lambda r: ran.update({r["job"]: r})
    )
    assert ran["bad"]["error"] == "status 1: ValueError: no such weights"
    assert ran["mute"]["error"] == "status 0: nothing"
    assert ran["slow"]["error"] == "took longer than 5 s"
    assert ran["good"]["load_s"] == 0.25 and "error" not in ran["good"]


def test_a_cold_job_counts_its_second_run_and_keeps_what_it_compiles(parts, tmp_path, monkeypatch):
    fake_worker(
        parts,
        monkeypatch,
        tmp_path,
        "import json, os\nfrom pathlib import Path\n"
        f"runs = Path({str(tmp_path / 'runs')!r})\n"
        "with open(runs, 'a') as file: file.write('x')\n"
        "cache = os.environ.get('JAX_COMPILATION_CACHE_DIR')\n"
        "print('RESULT ' + json.dumps({'runs': len(runs.read_text()), 'cache': cache}))\n",
    )
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "somewhere")
    jobs = parts("jobs")
    named = {job.name: job for job in jobs.all_jobs(tmp_path, {})}
    cold = dataclasses.replace(named["phi3-f32-cold"].settings, path="")
    figures = jobs.run_job(dataclasses.replace(named["phi3-f32-cold"], settings=cold), tmp_path, 9)
    assert figures == {"runs": 2, "cache": str(tmp_path / "compilation")}
    warm = dataclasses.replace(named["phi3-f32"].settings, path="")
    figures = jobs.run_job(dataclasses.replace(named["phi3-f32"], settings=warm), tmp_path, 9)
    assert figures == {"runs": 3, "cache": None}, "compiling is a figure of this one"


def test_what_is_missing_is_skipped_with_a_reason(parts, tmp_path, monkeypatch):
    jobs = parts("jobs")
    monkeypatch.setattr(jobs, "make_quantized", lambda folder: "no such option")
    named = {job.name: job for job in jobs.all_jobs(tmp_path, {})}
    asked = ("llama-q8_0", "phi3-int8", "phi3-f32", "limits-memory")
    reasons = jobs.why_not([named[name] for name in asked], tmp_path)
    assert reasons.keys() == {"llama-q8_0", "phi3-int8", "phi3-f32"}
    assert "setup llama" in reasons["llama-q8_0"]
    assert reasons["phi3-int8"] == "no such option"
    assert str(tmp_path / "ckpt" / "phi3-mid-f32") in reasons["phi3-f32"]


# --- The worker ------------------------------------------------------------------------------


def test_our_own_worker_measures_a_small_model(parts, tmp_path):
    jobs = parts("jobs")
    settings = jobs.Settings("ours", path=str(DEMO), **SMALL)
    figures = jobs.run_job(jobs.Job("phi3-f32", "phi3", settings), tmp_path, 120)
    assert "error" not in figures, figures
    assert figures.keys() >= set(parts("report").INFERENCE)
    assert len(figures["tokens"]) == 16 and all(0 <= token < 1024 for token in figures["tokens"])
    assert figures["versions"].keys() == {"jax", "jaxlib", "flax"}
    assert figures["cold_s"] > figures["load_s"] > 0


class Counting:
    """A peer whose first token takes long and whose others take none, by a clock of its own."""

    def __init__(self, clock):
        self.clock = clock

    def prefill(self, ids_BT):
        self.clock.now += 2.0

    def first(self, ids_BT, new):
        self.clock.now += 1.0

    def generate(self, ids_BT, new):
        self.clock.now += 1.0 + 0.5 * (new - 1)
        return ids_BT[:, :1].repeat(new, axis=1)


class Clock:
    now = 0.0

    def perf_counter(self):
        return self.now


def test_decoding_is_without_the_first_token(parts, monkeypatch):
    worker, clock = parts("worker"), Clock()
    monkeypatch.setattr(worker.time, "perf_counter", clock.perf_counter)
    settings = worker.Settings("", prompt=4, new=5, prefill=8, rows=3, rows_new=3)
    figures = worker.measure_inference(settings, lambda _: Counting(clock))
    assert figures["decode1_tps"] == pytest.approx(2.0)
    assert figures["decode8_tps"] == pytest.approx(6.0), "of three rows"
    assert figures["prefill_tps"] == pytest.approx(4.0)
    assert figures["cold_s"] == pytest.approx(1.0)


def test_others_have_what_is_busy_and_not_ours(parts, monkeypatch):
    worker, clock = parts("worker"), Clock()
    busy, own = iter([100.0, 112.0]), iter([50.0, 55.0])
    monkeypatch.setattr(worker.time, "perf_counter", clock.perf_counter)
    monkeypatch.setattr(worker, "machine_busy_s", lambda: next(busy))
    monkeypatch.setattr(worker, "own_busy_s", lambda: next(own))
    monkeypatch.setattr(worker.os, "cpu_count", lambda: 2)
    with worker.Others() as others:
        clock.now += 10.0
    assert others.share == pytest.approx((12 - 5) / 20)


def test_numpy_reads_memory_where_no_compiler_is(parts, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(SCRIPTS / "side_by_side")
    memory = importlib.import_module("limits_memory")
    monkeypatch.setattr(memory.subprocess, "run", lambda *_, **__: (_ for _ in ()).throw(OSError))
    by_numpy = memory.by_numpy
    monkeypatch.setattr(memory, "by_numpy", lambda threads: by_numpy(threads, 1 << 20))
    figures = memory.measure(parts("worker").Settings("", path=str(tmp_path / "stream")))
    assert figures["by"] == "numpy" and figures["streamed_gbs"] > 0


# --- Tables ----------------------------------------------------------------------------------


def test_medians_and_spreads_are_over_the_rounds_that_went_well(parts):
    rates = (30.0, 10.0, 20.0)
    rows = [row("phi3-f32", n, decode1_tps=rate) for n, rate in enumerate(rates)]
    rows.append(row("phi3-f32", 3, error="status 1: no"))
    spread = parts("report").spreads(rows)["phi3-f32"]["decode1_tps"]
    assert (spread.median, spread.low, spread.high) == (20.0, 10.0, 30.0)
    assert str(spread) == "20.0 [10.0-30.0]"


def test_the_table_of_goals(parts):
    text = parts("report").tables(
        results(
            row("phi3-f32", decode1_tps=22.0, load_s=0.6, decode8_tps=90.0),
            row("phi3-bf16", decode8_tps=110.0, rss_gb=0.9),
            row("phi3-f32-cold", cold_s=1.5),
            row("hf-f32", decode1_tps=20.0, decode8_tps=50.0, load_s=0.1, cold_s=1.3),
            row("llama-f32", decode1_tps=16.0, decode8_tps=80.0, load_s=0.7),
            row("llama-q8_0", decode1_tps=99.0, decode8_tps=99.0),
            row("llama-bf16", decode8_tps=100.0, rss_gb=0.7),
            row("limits-memory", streamed_gbs=25.0, by="C"),
        )
    )
    decode = cells(text, "decode 1 row, float32, tokens/s")
    assert decode[1:] == ["20.0 (transformers f32)", "22.0", "1.10", ">= 1.20 x", "no"]
    # The better of two precisions, on either side.
    rows = cells(text, "decode 8 rows, bfloat16 or float32, tokens/s")
    assert rows[1:] == ["100 (llama.cpp bf16)", "110 (bf16)", "1.10", ">= 1.10 x", "yes"]
    # Less is better: the best peer has the least.
    assert cells(text, "load, float32, s")[1:] == [
        "0.10 (transformers f32)", "0.60", "6.00", "<= 0.5", "no",
    ]  # fmt: skip
    cold = cells(text, "load, compile (cache warm) and first token, float32, s")
    assert cold[2] == "1.50" and cold[-1] == "yes"
    assert cells(text, "peak RSS, bfloat16, GB")[-1] == "yes"
    # Not measured.
    assert cells(text, "prefill 512, float32, tokens/s")[1:4] == ["-", "-", "-"]
    # 238.4 M weights of four bytes, 22 times a second, of 25 GB/s.
    assert cells(text, "- of it, part of streamed bandwidth")[2] == "0.84"


def test_weights_read_are_all_but_the_embeddings(parts):
    environments = parts("environments")
    embeddings = environments.MID["vocab_size"] * environments.MID["hidden_size"]
    assert sum(environments.weights_read()) + embeddings == 271_221_760


def test_the_other_tables(parts):
    text = parts("report").tables(
        results(
            row("hf-f32", decode1_tps=20.0, tokens=[5, 6, 7], others=0.01, versions={"torch": "9"}),
            row("phi3-f32", decode1_tps=21.0, tokens=[5, 6, 8], others=0.31, versions={"jax": "1"}),
            row("hf-f32-train", train_tps=150.0, compile_train_s=0.0, rss_gb=6.0, others=0.0),
            row("limits-jax", gemm_int8_gflops=123.0),
            row("llama-f32", error="status 1: no file"),
            skipped={"keras-f32": "no environment"},
        )
    )
    for word in ("2026-01-31", "Abacus 9", "2 cores", "jax 1, torch 9", "of 1 rounds"):
        assert word in text
    assert cells(text, "phi3-jax f32")[-2:] == ["2 of 3", "31%"]
    assert cells(text, "transformers f32")[1:3] == ["-", "20.0"]
    assert "| transformers f32 | 150 | 0.00 | 6.00 | 0% |" in text
    assert cells(text, "jax: gemm int8, GFLOP/s")[1] == "123"
    assert "- llama-f32, round 1: status 1: no file" in text
    assert "- keras-f32 was not run: no environment" in text
    assert "NOT THE REAL SIZES" not in text


def test_a_quick_run_says_so(parts):
    text = parts("report").tables(results(row("hf-f32", load_s=1.0), sizes={"new": 4}))
    assert "NOT THE REAL SIZES: {'new': 4}" in text


def test_the_commands_print_and_draw(tmp_path):
    file = tmp_path / "results.json"
    rows = [
        row("phi3-f32", n, prefill_tps=500.0 + n, decode1_tps=27.0 + n, decode8_tps=130.0)
        for n in range(3)
    ]
    rows += [row("hf-f32", n, prefill_tps=480.0, decode1_tps=20.0) for n in range(3)]
    file.write_text(json.dumps(results(*rows)))
    command = [sys.executable, str(SCRIPTS / "peers.py")]
    done = subprocess.run(
        [*command, "table", str(file)], check=True, capture_output=True, text=True
    )
    assert cells(done.stdout, "prefill 512, float32, tokens/s")[2] == "501 [500-502]"
    picture = tmp_path / "speed.png"
    subprocess.run([*command, "plot", str(file), str(picture)], check=True)
    assert picture.read_bytes()[:4] == b"\x89PNG" and picture.stat().st_size < 300_000


def test_bars_are_grouped_by_precision_and_sorted(parts):
    figures = parts("report").spreads(
        [
            row("hf-f32", decode1_tps=20.0),
            row("phi3-f32", decode1_tps=27.0),
            row("llama-bf16", decode1_tps=31.0),
            row("phi3-f32-train", train_tps=9.0),
        ]
    )
    bars = parts("plot").bars_of(figures, "decode1_tps", ("f32", "bf16"))
    assert [job for job, _ in bars] == ["phi3-f32", "hf-f32", "llama-bf16"]


# --- Setting up ------------------------------------------------------------------------------


def test_checkpoints_hold_the_same_values_in_both_dtypes(parts, tmp_path, monkeypatch):
    import phi3_jax as phi3

    environments = parts("environments")
    small = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    small |= {"intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 1100}
    small |= {"eos_token_id": 7, "pad_token_id": 7}
    monkeypatch.setattr(environments, "MID", environments.MID | small)
    environments.set_up(tmp_path, [])
    _, whole = phi3.from_pretrained(tmp_path / "ckpt" / "phi3-mid-f32", dtype=None)
    _, half = phi3.from_pretrained(tmp_path / "ckpt" / "phi3-mid-bf16", dtype=None)
    weight = whole["lm_head"]["weight"]
    assert weight.dtype == "float32" and half["lm_head"]["weight"].dtype == "bfloat16"
    assert (weight == half["lm_head"]["weight"].astype("float32")).all() and weight.std() > 0.01
    assert (tmp_path / "ckpt" / "phi3-mid-f32" / "tokenizer.model").is_file()
