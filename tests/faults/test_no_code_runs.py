"""A model folder is data: nothing in it is run, and no command writes outside its places."""

import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from model_folders import write_hf_folder

import phi3_jax as phi3
from phi3_jax.text import sandbox
from phi3_jax.text.chat import render_chat
from train.data_cache import DataCache
from train.records import open_records

ROOT = Path(__file__).parent.parent.parent
DEMO = ROOT / "phi3_jax" / "tiny_demo"
MESSAGES = [{"role": "user", "content": "Hi"}]

# What gets a template out of weaker sandboxes, or at files; what is refused is empty or an error.
ESCAPES = [
    "{{ messages.__class__.__mro__ }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ ''|attr('__class__') }}{{ (''|attr('__class__'))|attr('__mro__') }}",
    "{{ ''['__class__']['__mro__'] }}",
    "{{ ''.__class__|string }}",
    "{{ cycler.__init__.__globals__.os }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ '{0.__class__.__mro__}'.format('') }}",
    "{{ '{x.__class__.__globals__}'.format_map({'x': cycler}) }}",
    "{{ ['{0.__class__}']|map('format', '')|list }}",
    "{{ '%s'.__mod__ }}",
    "{{ self._TemplateReference__context }}",
    "{{ self.__init__.__globals__ }}",
    "{{ ['']|map(attribute='__class__')|list }}",
    "{{ ['']|map('attr', '__class__')|list }}",
    "{{ raise_exception.__code__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].update({'a': 1}) }}",
    "{{ messages[0].__setitem__('a', 1) }}",
    "{% include '/etc/passwd' %}",
    "{% import '/etc/passwd' as x %}",
    "{% from 'os' import system %}",
    "{% extends '/etc/passwd' %}",
    "{{ (messages|map('upper')).gi_frame }}",
    "{{ (messages|map('upper'))['gi_frame']['f_globals'] }}",
    "{{ range.__class__ }}",
    "{{ dict.fromkeys.__self__.__mro__ }}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}{{ x.__class__ }}",
    "{{ loop.__class__ }}{% for i in [1] %}"
    "{{ loop.__init__.__globals__ }}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
]
BOMBS = [
    "{{ 'a' * 10**10 }}",
    "{{ 10**10 * 'a' }}",
    "{{ [0] * 10**10 }}",
    "{% set ns = namespace(n=3) %}{% for i in range(100) %}"
    "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "{% for i in range(10**10) %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "{% for i in range(100000) %}{% for j in range(100000) %}a{% endfor %}{% endfor %}",
    "{% set x %}{% for i in range(100000) %}{% for j in range(100000) %}"
    "aaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}{% endfor %}{% endset %}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for x in [1, 1] recursive %}{% if loop.depth < 50 %}"
    "{{ loop([1, 1]) }}{% endif %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x %}"
    "{{ ns.x }}{{ ns.x }}{% endset %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = {'a': ns.x, 'b': ns.x} %}{% endfor %}{{ ns.x == ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = dict(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set ns = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set ns.x = range(2)|map(attribute='no', default=ns.x)|list %}{% endfor %}"
    "{{ ns.x }}",
    "{% set ns = namespace(x=namespace()) %}{% for i in range(60) %}"
    "{% set ns.x = namespace(a=ns.x, b=ns.x) %}{% endfor %}{{ ns.x }}",
    "{% set x = namespace() %}{% set x.x = x %}{{ x }}",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x|replace('a', ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x.join(ns.x) %}{% endfor %}",
    "{% set ns = namespace(x='a' * 1000) %}{% for i in range(60) %}"
    "{% set ns.x = ns.x|join(ns.x) %}{% endfor %}",
    "{{ (['a' * 10**7] * 10**4)|join }}",
    "{{ range(100000)|map('string')|join('a' * 10**7) }}",
    "{{ range(100000)|map('replace', '1', 'a' * 10**6)|list|length }}",
    "{{ ('a' * 10**6).translate({97: 'a' * 10**6}) }}",
    "{{ 'a'.center(10**10) }}",
    "{{ 'a'|center(10**10) }}",
    "{{ 'a'|center(9999999999) }}",
    "{{ 'a'.ljust(10**10) }}",
    "{{ 'a'.zfill(10**10) }}",
    "{{ '\\t'.expandtabs(10**9) }}",
    "{{ 'a'|indent(10**10) }}",
    "{{ ('a\\n' * 10**5)|indent(10**5) }}",
    "{{ '%999999999d' % 1 }}",
    "{{ '%*d' % (10**9, 1) }}",
    "{{ '%.999999999f' % 1 }}",
    "{{ '{:>9999999999}'.format(1) }}",
    "{{ '{:{}}'.format(1, '9999999999') }}",
    "{{ '%999999999d'|format(1) }}",
    "{{ ('{0}' * 10**5).format('a' * 10**6) }}",
    "{{ ('%s' * 10**5) % (('a' * 10**6,) * 10**5) }}",
    "{{ (5).to_bytes(10**10, 'big') }}",
    "{{ 5|round(-10**9) }}",
    "{{ [1]|batch(10**9, 'x')|list|length }}",
    "{{ [1]|slice(10**9)|list|length }}",
    "{{ lipsum(10**9) }}",
    "{{ messages|tojson(indent='a' * 10**6) }}",
    "{{ ('9' * 10**6)|int }}",
    "{{ ('f' * 10**6)|int(base=16) * 2 }}",
    "{% set ns = namespace(x=[]) %}{% for i in range(100000) %}"
    "{% set ns.x = ns.x + ['a' * 10**6 ~ i] %}{% endfor %}",
    "{% set l = range(100000)|list %}{% for i in range(100000) %}{% if -1 in l %}"
    "{% endif %}{% endfor %}",
    "{% set l = range(100000)|list %}{{ range(100000)|select('in', l)|list|length }}",
    "{{ range(100000)|map('string')|sum(start='') }}",
    "{{ strftime_now('%1000000000d') }}",
    "{% block a %}{{ self.a() }}{% endblock %}",
    "{% filter upper %}{% for i in range(100000) %}{% for j in range(100000) %}"
    "aaaaaaa{% endfor %}{% endfor %}{% endfilter %}",
    "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}{% call m() %}"
    "{% call m() %}{% for i in range(100000) %}{{ 'a' * 1000 }}{% endfor %}"
    "{% endcall %}{% endcall %}",
    "{{ dict.fromkeys(range(100000), 'a' * 10**6) }}",
]


class Evil:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path):
        self._mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self._mark),)


@pytest.fixture
def mark(tmp_path):
    """A path that is there once any of the code has run."""
    path = tmp_path / "mark"
    yield path
    assert not path.exists()


def test_counts():
    print(f"\nescapes: {len(ESCAPES)}\nbombs: {len(BOMBS)}")
    assert len(set(ESCAPES)) == len(ESCAPES) and len(set(BOMBS)) == len(BOMBS)


@pytest.mark.parametrize("template", ESCAPES)
def test_templates_do_not_get_out(template):
    try:
        text = render_chat(MESSAGES, template, {})
    except ValueError as error:
        assert str(error).startswith("the chat template failed: ")
    else:
        assert text in ("", "[Undefined]")


@pytest.mark.parametrize("template", BOMBS)
def test_templates_end(monkeypatch, template):
    """With an error, or with little text; without the memory that they ask for."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.2)
    monkeypatch.setattr(sandbox, "MAX_CHARACTERS", 1 << 24)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        text = render_chat(MESSAGES, template, {})
    except ValueError as error:
        words = str(error).removeprefix("the chat template failed: ")
        assert words != str(error) and words != "MemoryError"
    else:
        assert len(text) < sandbox.MAX_CHARACTERS
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 1 << 18  # of KiB


def test_what_templates_do_has_room():
    """A long conversation, gone through again and again, as published templates do."""
    template = (
        "{% set ns = namespace(last=-1, text='') %}"
        "{% for m in messages[::-1] %}{% set ns.last = [ns.last, loop.index0]|max %}{% endfor %}"
        "{% for m in messages %}{% set content = m['content'] %}{% if '</t>' in content %}"
        "{% set content = content.split('</t>')[-1].lstrip('\\n') %}{% endif %}"
        "{{ '<|%s|>' % m.role + content|replace('a', 'bb')|trim }}{{ m|tojson(indent=4) }}"
        "{% set ns.text = ns.text ~ m.role %}{% endfor %}{{ ns.text|length ~ ns.last }}"
    )
    messages = [{"role": "user", "content": f"<t>x</t>\n turn a {i}" * 20} for i in range(1000)]
    assert render_chat(messages, template, {}).endswith("4000999")


def fill_with_code(folder: Path, mark: Path) -> None:
    """Puts into a model folder what other loaders would run, or ask to."""
    evil = pickle.dumps(Evil(mark))
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pkl", "training_args.bin"):
        (folder / name).write_bytes(evil)
    code = f"import os; os.mkdir({str(mark)!r})\n"
    for name in ("modeling_evil", "configuration_evil", "tokenization_evil", "__init__", "jax"):
        (folder / f"{name}.py").write_text(code)
    auto_map = {
        "AutoConfig": "configuration_evil.C",
        "AutoTokenizer": ["tokenization_evil.T", None],
    }
    for name in ("config.json", "tokenizer_config.json"):
        path = folder / name
        values = json.loads(path.read_text()) | {"auto_map": auto_map}
        values |= {"tokenizer_class": "os.system", "processor_class": "__import__('os')"}
        path.write_text(json.dumps(values | {"custom_pipelines": {"x": {"impl": "evil.P"}}}))


def test_folders_with_code_load_without_it(tmp_path, mark, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(DEMO, folder)
    plain = phi3.Tokenizer.from_pretrained(folder).encode("Hello")
    fill_with_code(folder, mark)
    monkeypatch.chdir(folder)  # where `import jax` could find the folder's
    with pytest.warns(UserWarning, match=r"config\.json: auto_map names code, which is not run"):
        model, _ = phi3.from_pretrained(folder)
    assert type(model) is phi3.Phi3ForCausalLM
    with pytest.warns(UserWarning, match=r"tokenizer_config\.json: auto_map .*tokenization_evil"):
        assert phi3.Tokenizer.from_pretrained(folder).encode("Hello") == plain


@pytest.mark.parametrize("prefix", ["", "microsoft/Phi-3-mini-4k-instruct--"])
def test_microsofts_own_code_is_not_worth_a_warning(tmp_path, prefix):
    names = {
        "AutoConfig": f"{prefix}configuration_phi3.Phi3Config",
        "AutoModelForCausalLM": f"{prefix}modeling_phi3.Phi3ForCausalLM",
        "AutoTokenizer": "Xenova/gpt-4o",
    }
    (tmp_path / "config.json").write_text(json.dumps({"auto_map": names}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        phi3.Phi3Config.from_pretrained(tmp_path)


def test_a_pickle_alone_is_no_model(tmp_path, mark):
    write_hf_folder(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    (tmp_path / "model" / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match="is not a model folder"):
        phi3.from_pretrained(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        phi3.from_pretrained(tmp_path / "model")


def test_objects_in_arrays_are_not_made(tmp_path, mark):
    path = tmp_path / "data.npz"
    np.savez(path, key=np.array("k"), lengths=np.array([Evil(mark)], object))
    assert DataCache(path, "k").load() is None
    np.savez(path, key=np.array([Evil(mark)], object))
    assert DataCache(path, "k").load() is None


def test_classes_in_orbax_metadata_are_not_imported(tmp_path, mark):
    from convert.to_orbax import to_orbax

    write_hf_folder(tmp_path / "hf")
    to_orbax(tmp_path / "hf", tmp_path / "orbax")
    (tmp_path / "evil.py").write_text(f"import os; os.mkdir({str(mark)!r})\n")
    for path in (tmp_path / "orbax").rglob("*METADATA"):
        values = json.loads(path.read_text())
        values |= {"item_handlers": {"state": "evil.Handler"}, "value_type": "evil.Value"}
        path.write_text(json.dumps(values))
    script = f"import phi3_jax; print(phi3_jax.from_pretrained({str(tmp_path / 'orbax')!r})[0])"
    environ = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    done = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True)
    assert done.returncode == 0 and b"Phi3ForCausalLM" in done.stdout, done.stderr


def test_records_are_only_json_and_columns(tmp_path, mark):
    raw = pickle.dumps(Evil(mark))
    lines = {
        "pickle": raw.replace(b"\n", b""),
        "reduce": json.dumps({"py/reduce": ["os.mkdir", [str(mark)]]}).encode(),
        "object": json.dumps({"__class__": "os.mkdir", "text": "a"}).encode(),
    }
    path = tmp_path / "train.jsonl"
    path.write_bytes(b"\n".join(lines.values()) + b"\n")
    records = open_records(str(path))
    with pytest.raises(ValueError, match="is not"):
        records[0]
    assert records[1] == json.loads(lines["reduce"]) and records[2] == json.loads(lines["object"])
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type"}
    metadata[b"ARROW:extension:metadata"] = raw
    column = pyarrow.field("text", pyarrow.binary(), metadata=metadata)
    table = pyarrow.table([[raw]], schema=pyarrow.schema([column], {b"pandas": raw}))
    parquet.write_table(table, tmp_path / "train.parquet")
    assert open_records(str(tmp_path / "train.parquet"))[0] == {"text": raw}
    with open(tmp_path / "bad.parquet", "wb") as file:
        pickle.dump(Evil(mark), file)
    with pytest.raises(ValueError, match="cannot be read as Parquet"):
        open_records(str(tmp_path / "bad.parquet"))


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file() or not any(path.iterdir())
    }


@pytest.mark.slow
def test_commands_write_only_where_they_are_told(tmp_path):
    """With a source that cannot be written; the cache of compiled programs is the one exception."""
    source, home, cwd, temporary, out = (
        tmp_path / name for name in ("source", "home", "cwd", "tmp", "out")
    )
    for folder in (home, cwd, temporary, out):
        folder.mkdir()
    shutil.copytree(DEMO, source)
    data = tmp_path / "data"
    data.mkdir()
    messages = [*MESSAGES, {"role": "assistant", "content": "Hello."}]
    (data / "train.jsonl").write_text((json.dumps({"messages": messages}) + "\n") * 8)
    for folder in (source, data):
        for path in [*folder.iterdir(), folder]:
            path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(source), tree(data), tree(ROOT / "configs")
    environ = {
        **{key: value for key, value in os.environ.items() if not key.startswith("XDG_")},
        "HOME": str(home),
        "TMPDIR": str(temporary),
        "PYTHONPATH": str(ROOT),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    settings = [f"model.path={source}", f"data.path={data / 'train.jsonl'}", "steps=1"]
    settings += [f"folder={out / 'run'}", "evaluation.samples=()"]
    settings += ["batch_size=2", "data.sequence_length=64"]
    commands = {
        "generate": ["phi3_jax.cli", "Hello", "--model", source, "--max-new-tokens", "2"],
        "to-orbax": ["convert.cli", "to-orbax", source, out / "orbax"],
        "inspect": ["convert.cli", "inspect", source],
        "to-hf": ["convert.cli", "to-hf", out / "orbax", out / "hf"],
        "verify": ["convert.cli", "verify", source, out / "hf"],
        "train": ["train.cli", "smoke_cpu", *settings],
    }
    entries = {"phi3_jax.cli": "generate_command", "convert.cli": "main", "train.cli": "main"}
    for name, (module, *arguments) in commands.items():
        script = f"from {module} import {entries[module]} as run; run()"
        command = [sys.executable, "-c", script, *map(str, arguments)]
        done = subprocess.run(command, cwd=cwd, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, (name, done.stderr)
        assert (tree(source), tree(data), tree(ROOT / "configs")) == before, name
        assert not tree(cwd) and not tree(temporary), name
        kept = {Path(*Path(path).parts[:3]) for path in tree(home)}
        assert kept <= {Path(".cache", "phi3-jax", "compilation")}, (name, kept)
    assert sorted(path.name for path in out.iterdir()) == ["hf", "orbax", "run"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "cwd", "data", "home", "out", "source", "tmp"
    ]  # fmt: skip
