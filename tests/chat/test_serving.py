"""The exported folder under `transformers serve`, asked by OpenAI's own client, as the page on serving shows it."""

import contextlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from transformers import AutoProcessor, PreTrainedTokenizerFast

from firefly_lightning import FireflyModule
from firefly_lightning.data.sources.row_forms import read_rows
from firefly_lightning.huggingface import describe, write_description
from firefly_lightning.prompt import PRESETS, PromptEncoder
from tests.conftest import SPECIAL, tiny_bloom, write_rows
from tests.gguf.test_words import BLOOM, QWEN35, cut_by, trained
from tests.support.helpers import free_port, run
from tests.support.ranks import BIN
from tests.support.readme import DOCS, NOT_HERE, commands, read_blocks
from tests.support.small_runs import train

if torch.__version__.startswith("2.5."):
    pytest.skip("the oldest stack is without the extra serving", allow_module_level=True)

import openai  # of the extra

BLOCKS = read_blocks(DOCS / "en" / "serving.md")
SHOWN = [command for command in commands(BLOCKS) if not command.startswith(NOT_HERE)]

TALKS = [
    ("", [("你好", "世界😀！🎉"), ("然后呢？", "明月何时照我还"), ("hello", "龘𠮷 world")]),
    ("", [("hello", "龘𠮷 world"), ("然后呢？", "江南岸，🎉！")]),
    ("你是诗人。", [("你好", "春风又绿江南岸")]),
]
"""Conversations that the model has learned by heart, each with its system message. The same question has another answer
after other turns, or after a system message."""


def said(role: str, content: object) -> dict:
    return {"role": role, "content": content}


def to_messages(system: str, turns: list, question: str) -> list[dict]:
    past = [said(*pair) for turn in turns for pair in zip(("user", "assistant"), turn, strict=True)]
    return [*([said("system", system)] if system else []), *past, said("user", question)]


QUESTIONS = [
    (to_messages(system, turns[:count], question), answer)
    for system, turns in TALKS
    for count, (question, answer) in enumerate(turns)
]


@pytest.fixture(scope="module")
def box(fluent_folder, tmp_path_factory):
    """A folder with a trained and exported `chat-model`."""
    box = tmp_path_factory.mktemp("serving")
    rows = [
        {"messages": [*to_messages(system, turns[:-1], turns[-1][0]), said("assistant", turns[-1][1])]}
        for system, turns in TALKS
    ]
    file = write_rows(box / "rows.jsonl", rows * 8)
    module = FireflyModule(str(fluent_folder), learning_rate=5e-3, warmup_steps=2)
    train(fluent_folder, file, box, module=module, max_steps=80, data={"cache_dir": str(box / "cache")})
    run("firefly", "export", "--checkpoint", box / "checkpoints" / "last.ckpt", "--out", box / "chat-model")
    return box


@pytest.fixture(scope="module")
def port(box):
    """The port of a server that was started as the page says; the hub's cache is there, and empty."""
    port, (program, *arguments) = free_port(), shlex.split(SHOWN[0])
    assert (program, arguments[0]) == ("transformers", "serve")
    (box / "hub").mkdir()
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_CACHE": str(box / "hub")}
    with (box / "server.txt").open("w") as log:
        server = subprocess.Popen(
            [BIN / program, *arguments, "--port", port], cwd=box, env=os.environ | own, stdout=log, stderr=log
        )
    try:
        while not healthy(port):
            assert server.poll() is None, (box / "server.txt").read_text("utf-8", "replace")
            time.sleep(0.1)
        yield port
    finally:
        server.terminate()
        server.wait(60)


def healthy(port: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=20) as answer:
            return json.load(answer) == {"status": "ok"}
    except OSError:
        return False


@pytest.fixture
def client(port):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture
def ask(client):
    def ask(messages: list[dict], **settings: object):
        settings = {"temperature": 0, "max_tokens": 40, **settings}
        return client.chat.completions.create(model="chat-model", messages=messages, **settings)

    return ask


@pytest.fixture
def encoder(tokenizer) -> PromptEncoder:
    """Training's own, of the tokenizer that the model began with."""
    return PromptEncoder(tokenizer, PRESETS["firefly"])


def training_ids(encoder: PromptEncoder, messages: list[dict]) -> list[int]:
    """As training makes them: the first line of the first question is the system message."""
    texts = [message["content"] for message in messages if message["role"] != "system"]
    if messages[0]["role"] == "system":
        texts[0] = f"{messages[0]['content']}\n{texts[0]}"
    return encoder.encode_question(list(zip(texts[:-1:2], texts[1::2], strict=True)), texts[-1])


@pytest.mark.parametrize(("messages", "answer"), QUESTIONS)
def test_what_was_learned_is_answered_to_the_ids_of_training(messages, answer, ask, encoder):
    whole = ask(messages)
    assert whole.choices[0].message.content == answer
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.prompt_tokens == len(training_ids(encoder, messages))


@pytest.mark.parametrize(("messages", "answer"), QUESTIONS)
def test_a_streamed_answer_comes_in_whole_characters(messages, answer, ask, encoder):
    *chunks, last = ask(messages, stream=True)
    pieces = [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]
    assert "".join(pieces) == answer
    assert len(pieces) > 1 or answer in ("明月何时照我还", "春风又绿江南岸")  # each one token
    assert "\ufffd" not in "".join(pieces)
    assert last.choices[0].finish_reason == "stop"
    assert last.usage.prompt_tokens == len(training_ids(encoder, messages))


def test_a_conversation_is_that_of_firefly_chat(box, ask, monkeypatch):
    questions = ["你好", "然后呢？", "照我还 hello 😀", "世界春风"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, "/exit\n"])))
    told = ["--greedy", "--max_new_tokens", 12, "--device", "cpu"]
    shown = run("firefly", "chat", "--model", box / "chat-model", *told).stdout
    turns = []
    for question in questions:
        answer = ask(to_messages("", turns, question), max_tokens=12).choices[0].message.content
        turns.append((question, answer))
    assert shown == "".join(f"> {answer}\n" for _, answer in turns) + "> "
    assert len({answer for _, answer in turns}) > 2, "they are not all the same"


def test_special_tokens_that_are_typed_are_text(ask, encoder):
    messages = to_messages("<pad>", [("</s>好", "<s>")], "<unk></s></s>")
    ids = training_ids(encoder, messages)
    assert ids.count(encoder.eos_token_id) == 2 + 1 + 1, "two separators and an end"
    assert ask(messages, max_tokens=1).usage.prompt_tokens == len(ids)


def test_settings_of_a_request_hold(ask):
    messages = to_messages("", [], "江南")
    freely = {"temperature": 2.0, "top_p": 1.0}
    answers = [ask(messages, **freely, seed=seed).choices[0].message.content for seed in (1, 1, 2)]
    assert answers[0] == answers[1] != answers[2]
    surest = [ask(messages, temperature=2.0, top_p=0.01, seed=seed).choices[0].message.content for seed in (1, 2)]
    assert surest == [ask(messages).choices[0].message.content] * 2
    cut = ask(to_messages("", [], "你好"), max_tokens=2)
    assert (cut.choices[0].finish_reason, cut.usage.completion_tokens) == ("length", 2)


def test_clients_are_answered_at_once_and_after_one_has_gone(ask):
    endless = {"logit_bias": {"2": -100.0}, "max_tokens": 100_000}
    stream = ask(to_messages("", [], "你好"), stream=True, **endless)
    assert [next(stream) for _ in range(3)]
    stream.close()
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda pair: ask(pair[0]).choices[0].message.content, QUESTIONS))
    assert answers == [answer for _, answer in QUESTIONS]


def test_limits_of_the_server_that_the_page_names(client, ask, encoder):
    """When one of these is gone, the page has to say so."""
    assert client.models.list().data == []
    spaced = ask([said("user", [{"type": "text", "text": text} for text in ("你", "好")])], max_tokens=1)
    assert spaced.usage.prompt_tokens == len(encoder.encode_question([], "你 好"))
    assert spaced.usage.prompt_tokens != len(encoder.encode_question([], "你好"))
    assert ask(to_messages("", [], "你好"), stop="😀").choices[0].message.content == "世界😀"
    unbounded = client.chat.completions.create(
        model="chat-model", messages=to_messages("", [], "你好"), logit_bias={"2": -100.0}
    )
    assert unbounded.usage.completion_tokens == 1024
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="other", messages=to_messages("", [], "你好"))
    assert "pinned to 'chat-model'" in raised.value.response.text
    with pytest.raises(openai.InternalServerError):  # after which the server hangs up
        ask([said("user", "你好")] * 2)


def test_commands_and_snippets_of_the_page(box, port):
    """The first command has started the server; the others ask it."""
    assert [command.split()[0] for command in SHOWN] == ["transformers", "curl"]
    there = f"127.0.0.1:{port}"
    shown = subprocess.run(["bash", "-c", SHOWN[1].replace("127.0.0.1:8000", there)], capture_output=True, cwd=box)
    assert json.loads(shown.stdout)["choices"][0]["message"]["content"] == "世界😀！🎉"
    (snippet,) = (block.code for block in BLOCKS if block.language == "python")
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(snippet.replace("127.0.0.1:8000", there), "snippet", "exec"), {})
    assert out.getvalue() == "世界😀！🎉\n明月何时照我还\n"


@pytest.mark.parametrize("rules", [BLOOM, QWEN35], ids=["bloom", "qwen35"])
@pytest.mark.parametrize("prompt", PRESETS)
def test_the_reader_of_the_server_gives_the_ids_of_training(rules, prompt, rows_file, reviews, tmp_path):
    """In conversations of real text, cut by the rules of real vocabularies; this is how the server loads its reader."""
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trained(cut_by(rules), 1500), **SPECIAL)
    write_description(describe(tiny_bloom().config, tokenizer, PRESETS[prompt]), tmp_path)
    encoder, reader = PromptEncoder(tokenizer, PRESETS[prompt]), AutoProcessor.from_pretrained(tmp_path)
    talks = [row.turns for row in read_rows(str(rows_file))]
    assert {len(turns) for turns in talks} == {1, 2}
    for turns, question in zip(talks, [*reviews[:58], "</s>好<s>", ""], strict=True):
        messages = to_messages("", turns, question)
        read = reader.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, sanitize_control_tokens=True
        )
        assert read["input_ids"] == encoder.encode_question(turns, question)
