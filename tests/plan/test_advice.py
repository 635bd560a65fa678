"""What is tried for a job that does not fit, and in which order."""

from plan import advice
from plan.advice import advise, changes
from plan.figures import CompilerError
from plan.programs import DecodeJob, PrefillJob, TrainJob, parse_mesh
from train.config import load_config


def mesh(**sizes):
    return {"data": 1, "fsdp": 1, "sequence": 1, "tensor": 1, **sizes}


def words(job, sizes):
    return [text for text, _ in changes(job, sizes)]


def train_job(small, *overrides):
    return TrainJob("page", load_config("sft_mini_4k_v5e8", overrides), small())


def test_training_keeps_less_then_computes_in_parts_then_cuts_more(small):
    job = train_job(small, "model.remat=dots", "batch_size=32", "accumulate=1", "mesh.data=2")
    found = list(changes(job, mesh(data=2, fsdp=4)))
    assert [text for text, _ in found[:5]] == [
        "model.remat=attention",
        "model.remat=full",
        "model.remat=full accumulate=2",
        "model.remat=full accumulate=4",
        "model.remat=full accumulate=4 mesh.data=1 mesh.fsdp=8",
    ]
    assert found[5][0] == "model.remat=full accumulate=8 mesh.data=1 mesh.fsdp=4 mesh.tensor=2"
    last = found[5][1].config
    assert (last.model.remat, last.accumulate, last.mesh.tensor) == ("full", 8, 2)
    # The words say what the job is.
    again = train_job(
        small, "model.remat=dots", "batch_size=32", "accumulate=1", *found[5][0].split()
    )
    assert again.config == last


def test_what_is_at_its_end_is_not_tried(small):
    job = train_job(small, "model.remat=full", "batch_size=8", "accumulate=1")
    assert words(job, mesh(fsdp=8))[0].startswith("accumulate=2 mesh.fsdp=4")
    assert words(train_job(small, "batch_size=1", "accumulate=1"), mesh()) == []


def test_decoding_takes_another_cache_then_fewer_rows_then_another_mesh(small):
    job = DecodeJob("small", small(), 7, 40, parse_mesh("fsdp=2,tensor=2"))
    assert words(job, mesh(fsdp=2, tensor=2)) == [
        "--ring-cache",
        "--quantized-cache",
        "--quantized-cache --batch 3",
        "--quantized-cache --batch 1",
        "--quantized-cache --mesh tensor=4",
    ]
    *_, last = changes(job, mesh(fsdp=2, tensor=2))
    assert (last[1].batch, last[1].cache, last[1].mesh.tensor) == (7, "quantized", 4)
    # A window that is no smaller than the cache has nothing to give.
    short = PrefillJob("small", small(), 1, 20, 23, parse_mesh("tensor=4"))
    assert words(short, mesh(tensor=4)) == ["--quantized-cache"]


def test_the_first_that_fits_is_the_last_tried(small, figures, monkeypatch):
    said = []

    def compile_job(job, machine):
        if job.cache == "sliding_window":
            raise CompilerError("the compiler failed")
        return figures(fits=job.batch <= 3)

    monkeypatch.setattr(advice, "compile_job", compile_job)
    job = DecodeJob("small", small(), 7, 40, parse_mesh("fsdp=2,tensor=2"))
    none = figures(fits=False, mesh=mesh(fsdp=2, tensor=2))
    tried = advise(job, none, None, said.append)
    assert [one.change for one in tried] == ["--quantized-cache", "--quantized-cache --batch 3"]
    assert [one.figures.fits for one in tried] == [False, True]
    assert any("left out: the compiler failed" in line for line in said)
    assert sum("trying" in line for line in said) == 3


def test_it_gives_up(small, figures, monkeypatch):
    count = 0

    def compile_job(job, machine):
        nonlocal count
        count += 1
        return figures(fits=False)

    monkeypatch.setattr(advice, "compile_job", compile_job)
    job = train_job(small, "model.remat=none", "batch_size=4096", "accumulate=1", "mesh.data=2")
    none = figures(fits=False, mesh=mesh(data=2, fsdp=128))
    tried = advise(job, none, None, lambda text: None)
    assert len(tried) == count == advice.MOST_TRIES == 6
    assert not any(one.figures.fits for one in tried)
