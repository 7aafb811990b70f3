"""firefly chat --gguf: a file answers in llama.cpp as its model does in PyTorch."""

import builtins
import re
import threading
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
from transformers import GenerationConfig

from firefly_lightning.chat.answering import Answering
from firefly_lightning.chat.command import chat
from firefly_lightning.chat.llama import LlamaAnswering
from firefly_lightning.errors import FireflyError
from firefly_lightning.export import export
from tests.conftest import ANSWERS
from tests.support.helpers import one_line, raised_line, run

GREEDY = GenerationConfig(max_new_tokens=40, do_sample=False)


@pytest.fixture(scope="module")
def file(fluent_folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "模型.gguf"
    export(str(fluent_folder), gguf=str(path), gguf_type="f32")
    return path


@pytest.fixture(scope="module")
def answer(file):
    return LlamaAnswering(str(file), seed=0, max_new_tokens=None)


def test_answers_are_those_of_the_folder(answer, fluent_folder):
    own = Answering(str(fluent_folder), "cpu", "float32", seed=0, max_new_tokens=None)
    turns = []
    for question in [*ANSWERS, "江南", "春风"]:
        found = "".join(answer(turns, question, GREEDY))
        assert found == "".join(own(turns, question, GREEDY))
        turns.append((question, found))
    assert "".join(answer([], "你好", GREEDY)) == ANSWERS["你好"]


def test_the_settings_are_those_of_the_model(answer, fluent_folder):
    own = Answering(str(fluent_folder), "cpu", "float32", seed=0, max_new_tokens=None).config
    for name in ("do_sample", "temperature", "top_p", "repetition_penalty", "max_new_tokens"):
        assert getattr(answer.config, name) == getattr(own, name), name


def test_pieces_come_as_they_are_made_and_end_when_nobody_reads_on(answer):
    long = GenerationConfig(max_new_tokens=1500, do_sample=True, temperature=50.0, top_k=0, top_p=1.0)
    pieces = answer([], "你好", long)
    assert next(pieces)
    pieces.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]
    assert "".join(answer([], "你好", GREEDY)) == ANSWERS["你好"]


def test_one_answer_is_all_of_standard_output(file):
    result = run("firefly", "chat", "--gguf", file, "--prompt", "你好", "--greedy")
    assert result.stdout == ANSWERS["你好"] + "\n"


def test_a_conversation(file, monkeypatch, capsys):
    typed = iter(["你好", "hello", "/exit"])
    monkeypatch.setattr(builtins, "input", lambda prompt: next(typed))
    chat(gguf=str(file), greedy=True)
    assert capsys.readouterr().out.startswith(ANSWERS["你好"] + "\n")


def test_nobody_else_can_ask_its_server(answer):
    listening = answer._server.listening_address
    assert listening.startswith("http://127.0.0.1:")
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{listening}/props")


def test_a_conversation_that_is_too_long(answer):
    with pytest.raises(FireflyError, match="exceeds the available context size"):
        list(answer([], "你好" * 3000, GREEDY))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "--model, --gguf: name one of them"),
        (["--model", "x", "--gguf", "y.gguf"], "--model, --gguf: name one of them"),
        (["--gguf", "nowhere.gguf"], "--gguf nowhere.gguf: no such file; make one with firefly export --gguf"),
        (["--gguf", "README.md"], "--gguf README.md: is no GGUF"),
        (["--gguf", "README.md", "--dtype", "bfloat16"], "--device, --dtype: are not for --gguf"),
    ],
)
def test_what_cannot_be_loaded(given, says):
    assert says in one_line(run("firefly", "chat", *given, "--prompt", "你好", check=False))


def test_a_file_that_is_cut_short(file, tmp_path):
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(FireflyError, match=re.escape(f"--gguf {cut}: llama.cpp cannot load it")) as raised:
        chat(gguf=str(cut), prompt="你好")
    raised_line(raised)
