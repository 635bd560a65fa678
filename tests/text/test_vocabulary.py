import json
import shutil

import pytest
import tokenizers
from tokenizers import processors

from phi3_jax.text.tokenizer import Tokenizer

MESSAGES = [{"role": "user", "content": "Hello"}]


def write_json(path, value):
    path.write_text(json.dumps(value), encoding="utf-8")


def edit_json(path, edit):
    value = json.loads(path.read_text(encoding="utf-8"))
    edit(value)
    write_json(path, value)


SPLITS = {  # added tokens in brackets, U+2581 as _
    "<|user|>\nthe<|end|>\n<|assistant|>\n": "[<|user|>]_the[<|end|>][<|assistant|>]",
    "the<|endoftext|> the": "_the[<|endoftext|>]__the",
    "the \t<left> the": "_the[<left>]__the",
    "the <both> the": "_the[<both>]_the",
    "<|end|>  <left>": "[<|end|>][<left>]",
    "the\x1c<left>the": "_the<0x1C>[<left>]_the",
    # Whitespace as Rust sees it: U+0085 and U+3000 are, the separators from 0x1C on are not.
    "<|end|>\x85\u3000the": "[<|end|>]_the",
    "<|end|>\x1cthe": "[<|end|>]_<0x1C>the",
    "<|end|>ing": "[<|end|>ing]",
    # A normalized token is looked for with its dummy prefix.
    "the <norm>the": "_the[<norm>]the",
    "the<norm>the": "_the<0x3C>norm<0x3E>the",
    "<both><norm>\nthe": "[<both>][<norm>]the",
    "the two words": "_the[two words]",
}


@pytest.mark.parametrize("text", SPLITS)
def test_added_tokens_are_cut_out(toys, text):
    for tokenizer in toys:
        split = ""
        for id in tokenizer.encode(text):
            token = tokenizer.id_to_token(id).replace("\u2581", "_")
            split += f"[{token}]" if id >= tokenizer.vocab_size or token == "</s>" else token
        assert split == SPLITS[text]


def test_flags_in_tokenizer_config_go_before_those_in_tokenizer_json(toy_folders, tmp_path):
    for name, source in zip(("model", "json"), toy_folders, strict=True):
        folder = shutil.copytree(source, tmp_path / name)

        def keep_newlines(config):
            for entry in config["added_tokens_decoder"].values():
                entry["rstrip"] = False

        edit_json(folder / "tokenizer_config.json", keep_newlines)
        tokenizer = Tokenizer.from_pretrained(folder)
        assert tokenizer.encode("<|user|>\n") == tokenizer.encode("<|user|>") + tokenizer.encode(
            "\n"
        )


def test_a_token_is_special_that_is_named_or_called_so_anywhere(toy_folders, tmp_path):
    for name, source in zip(("model", "json"), toy_folders, strict=True):
        folder = shutil.copytree(source, tmp_path / name)

        def edit(config):
            config["eos_token"] = "</s>"
            for entry in config["added_tokens_decoder"].values():
                entry["special"] = False

        edit_json(folder / "tokenizer_config.json", edit)
        tokenizer = Tokenizer.from_pretrained(folder)
        assert tokenizer.decode([2], skip_special_tokens=True) == ""
        user = tokenizer.token_to_id("<|user|>")
        # Only tokenizer.json still calls it special.
        assert (user in tokenizer.special_ids) == (name == "json")


def test_folder_from_before_added_tokens_decoder(toy_folders, tmp_path):
    folder = shutil.copytree(toy_folders[0], tmp_path / "old")
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "added_tokens.json", {"<|user|>": 420, "<extra>": 430})
    write_json(
        folder / "special_tokens_map.json",
        {
            "eos_token": {"content": "</s>", "rstrip": True},
            "additional_special_tokens": ["<|user|>"],
        },
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    # bos and unk are named by tokenizer.model itself.
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert tokenizer.pad_token_id is None
    assert tokenizer.special_ids == {0, 1, 2, 420}
    the = tokenizer.encode("the")
    assert tokenizer.encode("<|user|>the</s> the <extra>") == [420, *the, 2, *the, 430]
    assert tokenizer.decode([420, *the, 430], skip_special_tokens=True) == "the<extra>"
    assert len(tokenizer) == 422
    with pytest.raises(ValueError, match="no pad token"):
        tokenizer.pad([[5]])


def test_bos_and_eos_are_added_where_the_folder_says_so(toy_folders, tmp_path):
    for name, source in zip(("model", "json"), toy_folders, strict=True):
        folder = shutil.copytree(source, tmp_path / name)
        plain = Tokenizer.from_pretrained(folder).encode("the")
        edit_json(
            folder / "tokenizer_config.json",
            lambda config: config.update(add_bos_token=True, add_eos_token=True),
        )
        tokenizer = Tokenizer.from_pretrained(folder)
        eos = tokenizer.eos_token_id
        assert tokenizer.encode("the") == [1, *plain, eos]
        assert tokenizer.encode("the", add_special_tokens=False) == plain
        # A chat template writes its own bos where it wants one.
        assert tokenizer.apply_chat_template(MESSAGES)[0] == tokenizer.token_to_id("<|user|>")
        edit_json(folder / "tokenizer_config.json", lambda config: config.update(bos_token=None))
        if name == "json":
            with pytest.raises(ValueError, match="bos_token"):
                Tokenizer.from_pretrained(folder)


@pytest.mark.parametrize("add_bos_token", [False, True])
def test_post_processor_goes_before_add_bos_token(toy_folders, tmp_path, add_bos_token):
    folder = shutil.copytree(toy_folders[1], tmp_path / "json")
    plain = Tokenizer.from_pretrained(folder).encode("the")
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    # What the run that saved the file had switched on is none of ours.
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(folder / "tokenizer.json"))
    edit_json(
        folder / "tokenizer_config.json", lambda config: config.update(add_bos_token=add_bos_token)
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.encode("the") == [1, *plain]
    assert tokenizer.encode("the the the", add_special_tokens=False) == plain * 3


def test_chat_template_of_the_folder(toy_folders, tmp_path):
    folder = shutil.copytree(toy_folders[0], tmp_path / "chat")
    edit_json(
        folder / "tokenizer_config.json",
        lambda config: config.update(
            chat_template="{{ bos_token }}{{ messages[0].content }}{{ pad_token }}"
        ),
    )
    tokenizer = Tokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(MESSAGES, tokenize=False) == "<s>Hello<|endoftext|>"
    ids = tokenizer.apply_chat_template(MESSAGES)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.pad_token_id)


def test_folder_without_a_vocabulary(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        Tokenizer.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder .*nowhere"):
        Tokenizer.from_pretrained(tmp_path / "nowhere")


BROKEN_MODELS = {
    "empty": b"",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 499723\n",
    "zeros": bytes(64),
}


@pytest.mark.parametrize("name", [*BROKEN_MODELS, "cut off"])
def test_broken_tokenizer_model(toy_folders, tmp_path, name):
    whole = (toy_folders[0] / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(BROKEN_MODELS.get(name, whole[: len(whole) // 2]))
    with pytest.raises(ValueError, match=r"tokenizer\.model \(\d+ bytes\) is "):
        Tokenizer.from_pretrained(tmp_path)


def drop_model(spec):
    del spec["model"]


def no_decoder(spec):
    del spec["decoder"]


def other_decoder(spec):
    spec["decoder"] = {"type": "WordPiece", "prefix": "##", "cleanup": True}


def strip_at_the_end(spec):
    spec["decoder"]["decoders"][3]["stop"] = 1


@pytest.mark.parametrize("edit", [drop_model, no_decoder, other_decoder, strip_at_the_end])
def test_broken_tokenizer_json(toy_folders, tmp_path, edit):
    folder = shutil.copytree(toy_folders[1], tmp_path / "broken")
    edit_json(folder / "tokenizer.json", edit)
    with pytest.raises(ValueError, match=r"tokenizer\.json \(\d+ bytes\): "):
        Tokenizer.from_pretrained(folder)


def test_cut_off_json_files(toy_folders, tmp_path):
    folder = shutil.copytree(toy_folders[1], tmp_path / "broken")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        whole = (folder / name).read_bytes()
        (folder / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=name):
            Tokenizer.from_pretrained(folder)
        (folder / name).write_text("[1]")
        with pytest.raises(ValueError, match=name):
            Tokenizer.from_pretrained(folder)
        (folder / name).write_bytes(whole)


def added_token(id, content):
    return lambda config: config["added_tokens_decoder"].update({id: {"content": content}})


COLLISIONS = {
    "an id of the vocabulary": ({}, added_token("300", "<new>"), "<new>.*300"),
    "a second id for a token": ({}, added_token("900", "<|user|>"), r"<\|user\|>.*900"),
    "the two files disagree": ({"<other>": 425}, lambda config: None, "425"),
    "no id": ({}, added_token("x", "<new>"), "no added token"),
    "no content": ({}, added_token("900", ""), "no added token"),
    "nothing by that name": ({}, lambda c: c.update(unk_token="<?>"), "unk_token is '<\\?>'"),
}


@pytest.mark.parametrize("name", COLLISIONS)
def test_added_tokens_that_collide(toy_folders, tmp_path, name):
    added, edit, match = COLLISIONS[name]
    for form, source in zip(("model", "json"), toy_folders, strict=True):
        folder = shutil.copytree(source, tmp_path / form)
        write_json(folder / "added_tokens.json", added)
        edit_json(folder / "tokenizer_config.json", edit)
        with pytest.raises(ValueError, match=match):
            Tokenizer.from_pretrained(folder)


def test_ids_that_the_tokenizers_library_would_number_otherwise(toy_folders, tmp_path):
    folder = shutil.copytree(toy_folders[1], tmp_path / "gap")
    edit_json(folder / "tokenizer_config.json", added_token("900", "<new>"))
    with pytest.raises(ValueError, match="should have the id 900"):
        Tokenizer.from_pretrained(folder)


def test_single_word_needs_a_tokenizer_json(toy_folders, tmp_path):
    entry = {"content": "<new>", "single_word": True, "normalized": False}
    folders = []
    for form, source in zip(("model", "json"), toy_folders, strict=True):
        folder = shutil.copytree(source, tmp_path / form)
        edit_json(
            folder / "tokenizer_config.json",
            lambda config: config["added_tokens_decoder"].update({"430": entry}),
        )
        folders.append(folder)
    with pytest.raises(ValueError, match="single_word"):
        Tokenizer.from_pretrained(folders[0])
    tokenizer = Tokenizer.from_pretrained(folders[1])
    assert 430 in tokenizer.encode("a <new> b")
    assert 430 not in tokenizer.encode("a<new>b")
