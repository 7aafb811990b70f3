import builtins
import copy
import io
import json
import re
import sys
import threading

import pytest
import torch
from transformers import BloomForCausalLM, GenerationConfig

from firefly_lightning.chat.command import chat
from firefly_lightning.errors import FireflyError
from firefly_lightning.evaluation import generation
from firefly_lightning.evaluation.generation import answer_prompts, change_decoding, default_decoding
from firefly_lightning.evaluation.rows_in_flight import RowsInFlight
from firefly_lightning.model.fast_bloom import FastBloom
from firefly_lightning.model.key_value_cache import KeyValueCache
from firefly_lightning.prompt import PRESETS, PromptEncoder
from tests.conftest import ANSWERS
from tests.support.helpers import raised_line

GREEDY = GenerationConfig(max_new_tokens=40, do_sample=False)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return PromptEncoder(tokenizer, PRESETS["firefly"])


@pytest.fixture(scope="module")
def bloom(fluent_bloom):
    return fluent_bloom


@pytest.fixture(scope="module")
def folder(fluent_folder):
    return fluent_folder


@pytest.fixture(params=["fast", "stock"])
def generate_stream(request):
    """Streams an answer, by this project's own generation or by Hugging Face's."""

    def stream(model, *arguments, **named):
        bloom = FastBloom(copy.deepcopy(model)) if request.param == "fast" else None
        return generation.generate_stream(model, *arguments, **named, bloom=bloom)

    return stream


def stock_answer(bloom, tokenizer, question, config):
    """Ids that stock Hugging Face generates for a first question."""
    ids = tokenizer(f"<s>{question}</s></s>", return_tensors="pt", add_special_tokens=False)["input_ids"]
    output = bloom.generate(
        ids, attention_mask=torch.ones_like(ids), generation_config=config, eos_token_id=2, pad_token_id=3
    )
    return output[0, ids.shape[1] :]


@pytest.mark.parametrize("question", ANSWERS)
def test_streamed_pieces_are_whole_characters_and_make_the_answer(bloom, encoder, question, generate_stream):
    pieces = list(generate_stream(bloom, encoder, [], question, GREEDY))
    assert "".join(pieces) == ANSWERS[question]
    assert "\ufffd" not in "".join(pieces)


def test_characters_come_as_soon_as_they_are_whole(bloom, encoder, generate_stream):
    # Neither is in the vocabulary: three and four tokens of one byte each.
    assert list(generate_stream(bloom, encoder, [], "hello", GREEDY))[:2] == ["龘", "𠮷"]


def test_pieces_of_an_answer_cut_inside_a_character_still_make_the_answer(bloom, encoder, tokenizer, generate_stream):
    cut = 0
    for length in range(1, 12):
        config = GenerationConfig(max_new_tokens=length, do_sample=False)
        pieces = list(generate_stream(bloom, encoder, [], "你好", config))
        expected = tokenizer.decode(stock_answer(bloom, tokenizer, "你好", config), skip_special_tokens=True)
        assert "".join(pieces) == expected
        assert all("\ufffd" not in piece for piece in pieces[:-1])
        cut += expected.endswith("\ufffd")
    assert cut > 2


def test_random_bytes_stream_as_they_decode(encoder, tokenizer, bloom):
    torch.manual_seed(1)
    untaught = BloomForCausalLM(bloom.config).eval()
    config = GenerationConfig(max_new_tokens=60, do_sample=True, top_k=0, temperature=2.0)
    for seed in range(5):
        pieces = list(generation.generate_stream(untaught, encoder, [], "你好", config, seed))
        torch.manual_seed(seed)
        ids = stock_answer(untaught, tokenizer, "你好", config)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special_tokens=True)


def test_a_seed_repeats_the_answer_and_leaves_the_random_state_alone(bloom, encoder, generate_stream):
    config = GenerationConfig(max_new_tokens=30, do_sample=True, temperature=3.0)
    state = torch.get_rng_state()
    first, again, other = ("".join(generate_stream(bloom, encoder, [], "你", config, seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert torch.equal(torch.get_rng_state(), state)


def test_an_error_of_generation_reaches_the_reader(bloom, encoder, monkeypatch, generate_stream):
    def broken(*args, **kwargs):
        raise ValueError("broken")

    monkeypatch.setattr(bloom.lm_head, "forward", broken)
    with pytest.raises(ValueError, match="broken"):
        list(generate_stream(bloom, encoder, [], "你好", GREEDY))


def test_generation_ends_when_nobody_reads_on(bloom, encoder, generate_stream):
    steps = []
    hook = bloom.lm_head.register_forward_hook(lambda *_: steps.append(1))
    config = GenerationConfig(max_new_tokens=5000, min_new_tokens=5000, do_sample=False)
    answer = generate_stream(bloom, encoder, [], "你好", config)
    next(answer)
    answer.close()
    hook.remove()
    assert len(steps) < 1000
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_a_greedy_batch_is_its_questions_one_by_one(bloom, encoder, tokenizer):
    questions = [*ANSWERS, "江南，江南，江南，江南岸", ""]
    alone = [stock_answer(bloom, tokenizer, question, GREEDY) for question in questions]
    expected = [tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    prompts = [encoder.encode_question([], question) for question in questions]
    assert answer_prompts(bloom, encoder, prompts, GREEDY) == expected
    assert expected[: len(ANSWERS)] == list(ANSWERS.values())
    assert [answer_prompts(bloom, encoder, [prompt], GREEDY)[0] for prompt in prompts] == expected
    assert answer_prompts(bloom, encoder, [], GREEDY) == []


@pytest.mark.parametrize(
    "changes",
    [{"do_sample": False}, {"temperature": 1.0, "top_p": 1.0}, {"do_sample": False, "repetition_penalty": 1.0}],
)
def test_a_setting_may_be_a_default_of_transformers(bloom, encoder, changes):
    """Also where the model's own is another: some releases of transformers take the model's for it."""
    own, plain = copy.deepcopy(bloom), copy.deepcopy(bloom)
    plain.generation_config = GenerationConfig()
    own.generation_config = GenerationConfig(do_sample=True, temperature=9.0, top_p=0.3, repetition_penalty=3.0)
    given = change_decoding(own.generation_config, {**changes, "max_new_tokens": 12, "min_new_tokens": 12})
    prompts = [encoder.encode_question([], question) for question in ("你好", "春风又绿江南岸")]
    answers = [answer_prompts(model, encoder, prompts, given, seed=1) for model in (own, plain)]
    streams = ["".join(generation.generate_stream(model, encoder, [], "你好", given, seed=1)) for model in (own, plain)]
    assert answers[0] == answers[1]
    assert streams[0] == streams[1]


def test_a_model_that_names_no_length_answers_as_published(bloom, folder):
    published = {
        "max_new_tokens": 200,
        "do_sample": True,
        "top_p": 0.85,
        "temperature": 0.35,
        "repetition_penalty": 1.2,
    }
    assert default_decoding(bloom).to_dict().items() >= published.items()
    loaded = BloomForCausalLM.from_pretrained(folder)
    loaded.generation_config.max_new_tokens = 7
    assert default_decoding(loaded).max_new_tokens == 7


def test_one_answer_is_all_of_stdout(folder, capsys):
    chat(str(folder), prompt="你好", device="cpu", seed=0)
    assert capsys.readouterr().out == ANSWERS["你好"] + "\n"


def test_longest_answer_is_the_callers(folder, capsys):
    chat(str(folder), prompt="春风又绿江南岸", device="cpu", seed=0, max_new_tokens=1)
    assert len(capsys.readouterr().out) < len(ANSWERS["春风又绿江南岸"])


@pytest.mark.parametrize(("encoding", "shown"), [("ascii", "utf-8"), ("latin-1", "utf-8"), ("gb18030", "gb18030")])
def test_terminals_of_any_encoding(folder, monkeypatch, encoding, shown):
    terminal = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(terminal, encoding=encoding))
    # How Python hands over a command line that the locale cannot decode.
    question = "你好".encode().decode("ascii", "surrogateescape")
    monkeypatch.setattr("os.fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    chat(str(folder), prompt=question, device="cpu", seed=0)
    assert terminal.getvalue().decode(shown) == ANSWERS["你好"] + "\n"


def type_in(monkeypatch, *lines):
    typed = iter(lines)

    def read(prompt):
        line = next(typed, EOFError)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr(builtins, "input", read)


def asked_ids(monkeypatch):
    """What every answer was generated from."""
    asked, fill = [], KeyValueCache.fill

    def record(self, place, ids, *others):
        asked.append(list(ids))
        return fill(self, place, ids, *others)

    monkeypatch.setattr(KeyValueCache, "fill", record)
    return asked


def test_a_conversation_remembers_until_cleared(folder, tokenizer, monkeypatch, capsys):
    asked = asked_ids(monkeypatch)
    type_in(monkeypatch, "你好", KeyboardInterrupt, "", "hello", "/clear", "hello", "/exit", "你好")
    chat(str(folder), device="cpu", seed=0)
    first = f"<s>你好</s></s>{ANSWERS['你好']}</s>hello</s>"
    assert asked == [tokenizer.encode(text) for text in ("<s>你好</s></s>", first, "<s>hello</s></s>")]
    assert capsys.readouterr().out.endswith(ANSWERS["hello"] + "\n")


def test_what_is_typed_for_the_program_is_not_sent_to_the_model(folder, tokenizer, monkeypatch, capsys):
    asked = asked_ids(monkeypatch)
    type_in(monkeypatch, "/help", "/temperature 3", "/clera", "/usr/bin", "//你好", "/exit", "你好")
    chat(str(folder), device="cpu", seed=0, max_new_tokens=1)
    shown = capsys.readouterr()
    assert "/temperature: no such command, and not sent to the model" in shown.err
    assert "/clera: no such command, and not sent to the model" in shown.err
    assert shown.err.count("/clear  forgets what was said") == 3
    assert asked[0] == tokenizer.encode("<s>/usr/bin</s></s>")
    assert tokenizer.decode(asked[1]).endswith("</s>/你好</s>")
    assert len(asked) == 2


SETTINGS = {
    "nothing": ({}, {"do_sample": True, "temperature": 0.35, "top_p": 0.85}),
    "temperature": ({"temperature": 1}, {"do_sample": True, "temperature": 1.0, "top_p": 0.85}),
    "top_p": ({"top_p": 0.5}, {"do_sample": True, "temperature": 0.35, "top_p": 0.5}),
    "greedy": ({"greedy": True}, {"do_sample": False}),
    "no temperature": ({"temperature": 0}, {"do_sample": False}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_chat_decodes_as_its_flags_say(name, folder, monkeypatch, capsys):
    given, expected = SETTINGS[name]
    used, begin = [], RowsInFlight.__init__

    def record(self, bloom, choice, *others, **named):
        used.append(choice._asdict())
        begin(self, bloom, choice, *others, **named)

    monkeypatch.setattr(RowsInFlight, "__init__", record)
    chat(str(folder), prompt="你好", device="cpu", seed=0, **given)
    assert {key: used[0][key] for key in expected} == expected
    if not expected["do_sample"]:
        assert capsys.readouterr().out == ANSWERS["你好"] + "\n"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"temperature": -0.1}, "--temperature is -0.1; it must be at least 0 and at most 100"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"temperature": 1e-300}, "--temperature is 1e-300; it must be at least 0.001"),
        ({"seed": 2**70}, "--seed is"),
        ({"top_p": 0}, "--top_p is 0; it must be above 0 and at most 1"),
        ({"top_p": 1.1}, "--top_p is 1.1"),
        ({"max_new_tokens": 0}, "--max_new_tokens is 0; it must be at least 1"),
        ({"greedy": True, "temperature": 0.5}, "--greedy draws no token: leave --temperature out"),
    ],
)
def test_chat_refuses_settings_before_a_model_is_loaded(given, says):
    with pytest.raises(FireflyError, match=re.escape(says)) as raised:
        chat("nowhere", prompt="你好", **given)
    raised_line(raised)


def test_an_interrupt_ends_the_answer_and_not_the_conversation(folder, tokenizer, monkeypatch, capsys):
    asked = asked_ids(monkeypatch)
    real_print = builtins.print

    def interrupted_once(*args, **kwargs):
        real_print(*args, **kwargs)
        if len(asked) == 1 and kwargs.get("end") == "":
            raise KeyboardInterrupt

    monkeypatch.setattr(builtins, "print", interrupted_once)
    type_in(monkeypatch, "春风又绿江南岸", "hello")
    chat(str(folder), device="cpu", seed=0)
    assert asked[1] == tokenizer.encode("<s>春风又绿江南岸</s></s></s>hello</s>")
    assert not [thread for thread in threading.enumerate() if thread.name == "generate"]


def test_chat_without_a_saved_format_says_what_it_assumes(folder, tmp_path, capsys):
    for file in folder.iterdir():
        if file.name != "prompt_format.json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tmp_path / "tokenizer_config.json"
    fields = json.loads(file.read_text("utf-8"))
    del fields["chat_template"]
    file.write_text(json.dumps(fields), "utf-8")
    chat(str(tmp_path), prompt="你好", device="cpu", seed=0)
    captured = capsys.readouterr()
    assert captured.out == ANSWERS["你好"] + "\n"
    note = captured.err.splitlines()[-1]
    lacks = "no prompt_format.json and no chat template that says its prompt format"
    assert note == f"note: {tmp_path} has {lacks}; firefly is used"


@pytest.mark.parametrize("device", ["nonsense", "cuda:99"])
def test_a_device_that_is_not_there_is_named(folder, device):
    with pytest.raises(FireflyError, match=f"device {device}: not on this machine") as raised:
        chat(str(folder), prompt="你好", device=device)
    assert "\n" not in str(raised.value)
