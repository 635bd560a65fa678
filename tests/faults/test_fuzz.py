"""Drawn inputs: configs, texts, names and headers. Each is taken, or refused with a ValueError.

HYPOTHESIS_PROFILE=long draws 75 times as many, and others each time, which takes minutes. What
packed rows and padding compute is drawn in tests/test_packing.py, beside rows computed alone.
"""

import collections
import functools
import json
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from model_folders import write_tensors
from reference import config_values, hf_weights, params_of

import phi3_jax as phi3
from phi3_jax.hf_format import DROPPED, HFWeights, WeightTable
from phi3_jax.safetensors_files import INDEX_FILE, SINGLE_FILE, Leaf, SafetensorsFolder
from phi3_jax.text.vocabulary import read_json
from train.packing import best_fit

LONG = os.environ.get("HYPOTHESIS_PROFILE") == "long"
DRAWN: collections.Counter[str] = collections.Counter()
PRESETS = sorted((Path(phi3.__file__).parent / "presets").glob("*.json"))
DEMO = Path(phi3.__file__).parent / "tiny_demo"
# No single input may take more of either.
SECONDS, KIBIBYTES = 20, 1 << 20


def fuzz(examples: int):
    return settings(
        max_examples=examples * (75 if LONG else 1),
        derandomize=not LONG,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


@pytest.fixture(scope="module", autouse=True)
def counts():
    yield
    print(*(f"\n{name}: {count}" for name, count in DRAWN.items()), sep="")


@pytest.fixture(autouse=True)
def bounded():
    """Also what is refused is refused soon, and without filling the memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < KIBIBYTES


# --- config.json -----------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(-3, 100_000),
    st.sampled_from([0, 1, 2, 3, 7, 96, 2**31, 2**63, 10**12, 10**30, 10**400, -(10**400)]),
    st.floats(),
    st.sampled_from([0.0, 0.5, 1.0, 1e-320, 1e308]),
)
SCALARS = st.one_of(NUMBERS, st.none(), st.booleans(), st.text(max_size=4))
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=3) | st.integers(0, 3).map(str), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = sorted(
    set().union(*(json.loads(path.read_text()) for path in PRESETS))
    | {"num_labels", "id2label", "label2id", "problem_type", "head_dim", "rope_parameters"}
    | {"extra", "partial_rotary_factor", "classifier_dropout", "auto_map", "self", "dtype"}
)
ROPE = ("type", "rope_type", "short_factor", "long_factor", "factor", "attention_factor")
ROPE += ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")


@st.composite
def configs(draw) -> dict:
    """A real config with some values changed, taken out or put in."""
    values = json.loads(draw(st.sampled_from(PRESETS)).read_text())
    for _ in range(draw(st.integers(1, 3))):
        field = draw(st.sampled_from(FIELDS) | st.text(max_size=5))
        match draw(st.sampled_from(["set", "number", "remove", "rope", "factor"])):
            case "set":
                values[field] = draw(VALUES)
            case "number":
                values[field] = draw(NUMBERS)
            case "remove":
                values.pop(field, None)
            case "rope":
                rope = values.get(draw(st.sampled_from(["rope_scaling", "rope_parameters"])))
                if isinstance(rope, dict):
                    rope[draw(st.sampled_from(ROPE))] = draw(VALUES)
            case "factor":
                rope = values.get("rope_scaling")
                if isinstance(rope, dict) and isinstance(rope.get("long_factor"), list):
                    rope["long_factor"][draw(st.integers(0, 20))] = draw(SCALARS)
    return values


def same(one: phi3.Phi3Config, other: phi3.Phi3Config) -> bool:
    # As JSON: what is kept of unknown keys may hold a NaN.
    return json.dumps(one.to_dict(), sort_keys=True) == json.dumps(other.to_dict(), sort_keys=True)


@fuzz(100)
@given(values=configs())
def test_a_config_round_trips_or_is_refused_by_name(values):
    DRAWN["configs"] += 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(values))
        try:
            config = phi3.Phi3Config.from_pretrained(folder)
        except ValueError as error:
            words = str(error).removeprefix(f"{path}: ")
            assert any(name in words for name in (*FIELDS, *ROPE)), words
        else:
            hash(config)
            assert same(phi3.Phi3Config.from_dict(config.to_dict()), config)
    assert time.monotonic() - start < SECONDS


@pytest.mark.parametrize(
    "raw",
    [b"[" * 100_000, b'{"a":' * 100_000, b'{"vocab_size": 1' + b"0" * 5000],
    ids=["lists", "objects", "digits"],
)
def test_files_that_break_parsers(tmp_path, raw):
    for name in ("config.json", "tokenizer_config.json", "generation_config.json", INDEX_FILE):
        (tmp_path / name).write_bytes(raw)
    with pytest.raises(ValueError, match="is not JSON"):
        phi3.Phi3Config.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="generation_config.json"):
        phi3.GenerationConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is not JSON"):
        read_json(tmp_path / "tokenizer_config.json")
    (problem,) = SafetensorsFolder(tmp_path).problems
    assert problem.startswith(f"{INDEX_FILE}: not an index")


# --- Rows -------------------------------------------------------------------------------------


@fuzz(80)
@given(lengths=st.lists(st.integers(1, 300), max_size=300), capacity=st.integers(1, 300))
def test_rows_hold_every_document_once(lengths, capacity):
    DRAWN["packings"] += 1
    lengths = np.array([length for length in lengths if length <= capacity], np.int64)
    rows = best_fit(lengths, capacity)
    held = [rows.documents(row) for row in range(rows.rows)]
    assert sorted(document for row in held for document in row) == list(range(len(lengths)))
    assert all(0 < lengths[row].sum() <= capacity for row in held)


# --- What a token sees ------------------------------------------------------------------------

WIDTH = 9


@functools.cache
def one_layer(window: int | None):
    values = {**config_values("gqa"), "num_hidden_layers": 1, "sliding_window": window}
    config = phi3.Phi3Config(**values)
    model, params = phi3.Phi3ForCausalLM(config), params_of(config, hf_weights(config, "seen"))
    call = jax.jit(lambda ids, inputs: model.apply({"params": params}, ids, **inputs).logits)
    return lambda ids, **inputs: np.asarray(call(ids, inputs))


@fuzz(40)
@given(
    window=st.sampled_from([None, 3]),
    kind=st.sampled_from(["attention_mask", "segment_ids", "position_ids"]),
    runs=st.lists(st.tuples(st.integers(1, 5), st.integers(0, 3)), min_size=1, max_size=9),
    seed=st.integers(0, 1 << 30),
)
def test_a_token_sees_what_numpy_says(window, kind, runs, seed):
    """A logit of a single layer changes with each token that is seen, and with no other."""
    DRAWN["masks"] += 1
    rng = np.random.default_rng(seed)
    runs = [run for run in runs for _ in range(run[0])] + [(WIDTH, 1)] * WIDTH
    runs = [(number, run) for number, run in enumerate(runs[:WIDTH])]
    documents = np.cumsum([number > 0 and run != runs[number - 1][1] for number, run in runs])
    real = np.array([run[1] > 0 for _, run in runs])
    place = np.arange(WIDTH)
    sees = (place[:, None] >= place) & (place[:, None] - place < (window or WIDTH))
    if kind == "attention_mask":
        sees, given_ = sees & real, real.astype(np.int32)
    elif kind == "segment_ids":
        sees &= (documents[:, None] == documents) & real
        given_ = np.where(real, documents + 1, 0).astype(np.int32)
    else:
        real = np.ones(WIDTH, bool)
        sees &= documents[:, None] == documents
        first = [np.flatnonzero(documents == one)[0] for one in documents]
        given_ = (place - first).astype(np.int32)
    ids = np.tile(rng.integers(0, 90, WIDTH).astype(np.int32), (WIDTH + 1, 1))
    ids[1 + place, place] += 1  # row 1 + j has another token j
    logits = one_layer(window)(ids, **{kind: np.tile(given_, (WIDTH + 1, 1))})
    changed = np.abs(logits[1:] - logits[0]).max(-1).T > 1e-5
    assert np.array_equal(changed[real], sees[real])


# --- Texts ------------------------------------------------------------------------------------

SCRAPS = st.sampled_from(
    [
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
        "<|endoftext|>",
        "<s>",
        "<unk>",
        "<|end",
        "|>",
        "<0x0A>",
    ]
    + [
        "\0",
        "\ud800",
        "\udfff",
        "e\u0301\u0301",
        "\u202e",
        "\ufeff",
        "\ufffd",
        "\u2581",
        "\n\n",
        "  ",
    ]
    + ["\U0001f9d1\u200d\U0001f680", "\U0010ffff", "\x85", "\u2028", "a" * 300, "\u0e33", "\ufb01"]
)
CHARACTERS = st.characters(codec=None)  # surrogates among them
TEXTS = st.lists(SCRAPS | st.text(CHARACTERS, max_size=8), max_size=10).map("".join)


@pytest.fixture(scope="module")
def tokenizer():
    return phi3.Tokenizer.from_pretrained(os.environ.get("PHI3_TOKENIZER_DIR", DEMO))


@fuzz(150)
@given(text=TEXTS)
def test_a_text_comes_back_or_is_refused(tokenizer, text):
    """White space behind added tokens apart, which those of Phi-3 take up."""
    DRAWN["texts"] += 1
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(ValueError, match="half of a surrogate pair"):
            tokenizer.encode(text)
        return
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert all(0 <= id < 1 << 18 for id in ids)
    squeeze = lambda text: "".join(text.replace("\u2581", " ").split())  # noqa: E731
    back = tokenizer.decode(ids)
    if not any(name in text for name in ("<unk>", "<s>")):
        assert squeeze(back) == squeeze(text)
    if not any(id in tokenizer.special_ids for id in ids):
        assert back == text.replace("\u2581", " ")


# --- Names of weights -------------------------------------------------------------------------

CONFIG = phi3.Phi3Config(
    vocab_size=5, hidden_size=4, intermediate_size=6, num_hidden_layers=2, num_attention_heads=2,
    pad_token_id=0,
)  # fmt: skip
TABLE = WeightTable(CONFIG)
SHAPES = {TABLE.hf_name(path, layer): TABLE.hf_shape(path) for path, layer in TABLE.parts}


@st.composite
def renamed(draw) -> dict[str, str]:
    """The names of a model, some of them changed."""
    names = {name: name for name in SHAPES}
    parts = st.sampled_from(["model", "layers", "0", "1", "2", "01", "-1", "\u0661", "weight", ""])
    inv_freq = st.sampled_from(
        ["model.layers.1.self_attn.rotary_emb.inv_freq", "rotary_emb.inv_freq"]
    )
    odd = st.one_of(st.text(max_size=6), inv_freq, st.lists(parts, max_size=4).map(".".join))
    for name in draw(st.lists(st.sampled_from(sorted(SHAPES)), max_size=3)):
        at = draw(st.integers(0, len(name)))
        names[name] = draw(
            st.one_of(odd, st.just(name[:at] + draw(st.text(max_size=1)) + name[at:]))
        )
    return names


@fuzz(80)
@given(names=renamed(), extra=st.lists(st.text(max_size=8), max_size=2), sharded=st.booleans())
def test_names_are_a_bijection_or_refused(names, extra, sharded):
    DRAWN["namings"] += 1
    found = {new: SHAPES[old] for old, new in names.items()} | {name: (1,) for name in extra}
    found.pop("__metadata__", None)
    whole = {name for name in found if not DROPPED.fullmatch(name)}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        try:
            tensors = {name: np.full(shape, 1, np.float32) for name, shape in found.items()}
            [name.encode() for name in tensors]
        except UnicodeEncodeError:
            return
        write_tensors(folder, tensors, 64 if sharded else 1 << 30)
        try:
            weights = HFWeights(folder, CONFIG)
        except ValueError as error:
            assert whole != set(SHAPES)
            assert "problem" in str(error)
        else:
            assert whole == set(SHAPES)
            read = [weights.table.hf_name(*part) for part in weights.table.parts]
            assert sorted(read) == sorted(SHAPES)


HOMES = st.one_of(
    st.sampled_from(["a.safetensors", "b.safetensors", "../a.safetensors", "/etc/passwd", "", "."]),
    VALUES,
)


@fuzz(80)
@given(
    index=st.dictionaries(st.sampled_from(["t", "u", "v"]) | st.text(max_size=3), HOMES, max_size=4)
)
def test_an_index_reads_only_its_folder(index):
    DRAWN["indices"] += 1
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        folder.mkdir()
        for outside in (Path(place, "a.safetensors"), folder / "a.safetensors"):
            safetensors.numpy.save_file({"t": np.zeros(2, np.float32)}, outside)
        (folder / INDEX_FILE).write_text(json.dumps({"weight_map": index}))
        files = SafetensorsFolder(folder)
        assert {entry.file for entry in files.entries.values()} <= {folder / "a.safetensors"}
        assert files.problems or set(index) == {"t"} or not index


# --- Headers ----------------------------------------------------------------------------------

ARRAYS = {
    "one": np.arange(6, dtype=np.float32).reshape(2, 3),
    "two": np.arange(4, dtype=np.float16),
    "none": np.zeros((0, 3), np.float32),
}
WHOLE = safetensors.numpy.save(ARRAYS, {"format": "pt"})
HEADER = 8 + int.from_bytes(WHOLE[:8], "little")


@st.composite
def broken(draw) -> bytes:
    """A file with bytes of its header changed, put in, or cut off."""
    raw = bytearray(WHOLE)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, HEADER - 1))
        match draw(st.sampled_from(["set", "digit", "cut", "insert", "size"])):
            case "set":
                raw[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "digit":
                places = [
                    place
                    for place in range(8, min(HEADER, len(raw)))
                    if raw[place] in b"0123456789"
                ]
                for place in draw(st.lists(st.sampled_from(places), max_size=2)) if places else ():
                    raw[place : place + 1] = draw(
                        st.sampled_from([b"9", b"0", b"-1", b"1e9", b"2.0"])
                    )
            case "cut":
                del raw[draw(st.integers(0, len(raw))) :]
            case "insert":
                raw[at:at] = draw(st.binary(max_size=3))
            case "size":
                raw[:8] = draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little")
    return bytes(raw)


def arrays_in(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    files = SafetensorsFolder(folder)
    if files.problems:
        raise ValueError(files.problems)
    for name, entry in files.entries.items():
        yield name, files.read_bytes(name)
        assert Leaf(entry.shape, np.dtype(np.uint8)).nbytes <= len(WHOLE)


@fuzz(200)
@given(raw=broken())
def test_a_header_is_read_as_the_library_reads_it_or_refused(raw):
    DRAWN["headers"] += 1
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        (Path(place) / SINGLE_FILE).write_bytes(raw)
        try:
            found = {name: array.tobytes() for name, array in arrays_in(Path(place))}
        except ValueError:
            found = None
    try:
        expected = {name: bytes(entry["data"]) for name, entry in safetensors.deserialize(raw)}
    except safetensors.SafetensorError:
        expected = None
    assert found == expected
    assert time.monotonic() - start < SECONDS
