import copy
import inspect
import json
import pickle
import re

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError
from firefly_lightning.prompt import (
    PRESETS,
    PromptEncoder,
    PromptFormat,
    check_special_tokens,
    format_of_template,
    prompt_format,
)
from tests.conftest import SPECIAL, tiny_tokenizer

SEPARATORS = {
    "firefly": ("</s></s>", "</s>"),
    "firefly_turns": ("</s></s>", "</s></s>"),
    "firefly_single": ("</s>",) * 2,
}
ROWS = [
    [("上联：春风又绿江南岸", "下联：明月何时照我还")],
    [("你好", "世界 😀"), (" hello\n", "world"), ("", " 还 "), ("还", "")],
]


@pytest.fixture(scope="module")
def stock():
    return tiny_tokenizer()


def literal(turns, first, later):
    """The row as one string, and the (begin, end) characters of what is learned."""
    text, spans = "<s>", []
    for index, (source, target) in enumerate(turns):
        text += source + (later if index else first)
        spans.append((len(text), len(text) + len(target) + len("</s>")))
        text += target + "</s>"
    return text, spans


@pytest.mark.parametrize("turns", ROWS)
@pytest.mark.parametrize("name", SEPARATORS)
def test_ids_and_mask_are_those_of_the_literal_string(stock, name, turns):
    text, spans = literal(turns, *SEPARATORS[name])
    expected = stock(text, add_special_tokens=False, return_offsets_mapping=True)
    row = PromptEncoder(stock, PRESETS[name]).encode([turns])[0]
    assert row.input_ids == expected["input_ids"]
    assert row.target_mask == [
        any(begin <= start < end for begin, end in spans) for start, _ in expected["offset_mapping"]
    ]


def test_presets_are_all_tested():
    assert PRESETS.keys() == SEPARATORS.keys()


@pytest.mark.parametrize("name", SEPARATORS)
def test_question_ends_where_the_answer_begins(stock, name):
    first, later = SEPARATORS[name]
    encoder = PromptEncoder(stock, PRESETS[name])
    assert encoder.encode_question([], "你好") == stock.encode(f"<s>你好{first}")
    text, _ = literal(ROWS[1], first, later)
    assert encoder.encode_question(ROWS[1], "你好") == stock.encode(f"{text}你好{later}")


@pytest.mark.parametrize("duplicate", [lambda it: it, copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_special_tokens_typed_by_a_user_stay_text(stock, duplicate):
    encoder = duplicate(PromptEncoder(stock, PRESETS["firefly"]))
    row = encoder.encode([[("好</s>好", "<s>世界<pad>")]])[0]
    assert [index for index in row.input_ids if index < 4] == [1, 2, 2, 2]
    assert stock.decode(row.input_ids, skip_special_tokens=True) == "好</s>好<s>世界<pad>"


def test_settings_of_the_tokenizer_are_neither_used_nor_changed(stock):
    tokenizer = copy.deepcopy(stock)
    tokenizer("你好世界", truncation=True, max_length=1, padding="max_length")
    row = PromptEncoder(tokenizer, PRESETS["firefly"]).encode([ROWS[0]])[0]
    assert row.input_ids == stock.encode(literal(ROWS[0], *SEPARATORS["firefly"])[0])
    assert tokenizer.encode("</s>") == [2]


CUSTOM = PromptFormat(start="", separator="</s>\n'\"\\{{}}\r%}<s>", later_separator="<pad>", end="</s>😀</s>")


def apply(stock, prompt, messages, **kwargs):
    kwargs = {"return_dict": False, **kwargs}
    return stock.apply_chat_template(messages, chat_template=prompt.chat_template(), **kwargs)


def as_messages(turns, content=lambda text: text):
    return [
        {"role": role, "content": content(text)}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


ALL_FORMATS = pytest.mark.parametrize("prompt", [*PRESETS.values(), CUSTOM], ids=[*PRESETS, "custom"])


@ALL_FORMATS
@pytest.mark.parametrize("turns", ROWS)
def test_chat_template_gives_the_ids_and_the_mask_of_training(stock, prompt, turns):
    encoder, messages = PromptEncoder(stock, prompt), as_messages(turns)
    row = encoder.encode([turns])[0]
    assert apply(stock, prompt, messages) == row.input_ids
    marked = apply(stock, prompt, messages, return_dict=True, return_assistant_tokens_mask=True)
    assert (marked["input_ids"], marked["assistant_masks"]) == (row.input_ids, list(map(int, row.target_mask)))
    asked = apply(stock, prompt, messages[:-1], add_generation_prompt=True)
    assert asked == encoder.encode_question(turns[:-1], turns[-1][0])


@ALL_FORMATS
def test_chat_template_reads_a_list_of_parts_as_their_text(stock, prompt):
    def parts(text):
        return [{"type": "text", "text": text[:1]}, {"type": "text", "text": text[1:]}]

    assert (
        apply(stock, prompt, as_messages(ROWS[1], parts)) == PromptEncoder(stock, prompt).encode([ROWS[1]])[0].input_ids
    )


@ALL_FORMATS
@pytest.mark.parametrize(
    ("system", "line"),
    [
        ([{"role": "system", "content": "你好"}], "你好\n"),
        ([{"role": "system", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}], "你好\n"),
        ([{"role": "system", "content": "你好"}, {"role": "developer", "content": "world"}], "你好\nworld\n"),
        ([{"role": "system", "content": ""}], ""),
    ],
    ids=["text", "parts", "two", "empty"],
)
def test_a_system_message_is_a_line_before_the_first_question(stock, prompt, system, line):
    (source, target), *later = ROWS[1]
    row = PromptEncoder(stock, prompt).encode([[(line + source, target), *later]])[0]
    marked = apply(stock, prompt, system + as_messages(ROWS[1]), return_dict=True, return_assistant_tokens_mask=True)
    assert (marked["input_ids"], marked["assistant_masks"]) == (row.input_ids, list(map(int, row.target_mask)))
    asked = apply(stock, prompt, [*system, {"role": "user", "content": source}], add_generation_prompt=True)
    assert asked == PromptEncoder(stock, prompt).encode_question([], line + source)


@ALL_FORMATS
def test_typed_special_tokens_are_text_where_transformers_can_tell_them_apart(stock, prompt):
    if "sanitize_control_tokens" not in inspect.signature(stock.apply_chat_template).parameters:
        pytest.skip("this transformers reads them as special tokens")
    turns = [("好</s>好", "<s>世界<pad>"), ("</s>", "你好")]
    tokenizer = copy.deepcopy(stock)
    tokenizer.chat_template = prompt.chat_template()
    ids = tokenizer.apply_chat_template(as_messages(turns), return_dict=False, sanitize_control_tokens=True)
    assert ids == PromptEncoder(stock, prompt).encode([turns])[0].input_ids


@ALL_FORMATS
def test_an_answer_that_is_begun_is_continued(stock, prompt):
    encoder, messages = PromptEncoder(stock, prompt), as_messages(ROWS[0])
    tokenizer = copy.deepcopy(stock)
    tokenizer.chat_template = prompt.chat_template()
    begun = tokenizer.apply_chat_template(messages, continue_final_message=True, return_dict=False)
    assert begun + encoder.controls.end == encoder.encode([ROWS[0]])[0].input_ids


def said(role, content="你好", **fields):
    return {"role": role, "content": content, **fields}


TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}


@pytest.mark.parametrize(
    ("messages", "given", "message"),
    [
        ([said("assistant")], {}, "alternate"),
        ([said("user"), said("user")], {}, "alternate"),
        ([said("user"), said("assistant"), said("assistant")], {}, "alternate"),
        ([said("user"), said("system"), said("user")], {}, "alternate"),
        ([said("user"), said("tool")], {}, "alternate"),
        ([said("narrator")], {}, "alternate"),
        ([{"content": "你好"}], {}, "alternate"),
        ([said("system")], {}, "no user message"),
        ([said("system")], {"add_generation_prompt": True}, "no user message"),
        ([{"role": "user"}], {}, "must be text"),
        ([said("user", None)], {}, "must be text"),
        ([said("user", 5)], {}, "must be text"),
        ([said("user", {"type": "text", "text": "你好"})], {}, "must be text"),
        ([said("user", ["你好"])], {}, "only parts of text"),
        ([said("user", [{"type": "image", "url": "x"}])], {}, "only parts of text"),
        ([said("user", [{"type": "text"}])], {}, "only parts of text"),
        ([said("user", [{"type": "text", "text": 5}])], {}, "only parts of text"),
        ([said("user"), said("assistant", "", tool_calls=[TOOL])], {}, "tool_calls"),
        ([said("user")], {"tools": [TOOL]}, "without tools"),
        ([said("user")], {"documents": [{"title": "a", "text": "b"}]}, "without tools and documents"),
    ],
)
def test_chat_template_refuses_what_training_never_saw(stock, messages, given, message):
    with pytest.raises(jinja2.TemplateError, match=message):
        apply(stock, PRESETS["firefly"], messages, **given)


def test_chat_template_is_ascii_wherever_its_control_strings_are():
    assert all(prompt.chat_template().isascii() for prompt in PRESETS.values())


# As releases before this one wrote it, with which models have been exported.
EARLIER_TEMPLATE = (
    "{{ START }}{% for message in messages %}"
    "{% if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') %}{{ raise_exception('…') }}{% endif %}"
    "{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ END }}"
    "{% elif not loop.last or add_generation_prompt %}{{ SEPARATOR if loop.first else LATER }}{% endif %}{% endfor %}"
)


@ALL_FORMATS
@pytest.mark.parametrize("earlier", [False, True], ids=["this release", "earlier"])
def test_a_format_is_known_by_its_chat_template(stock, prompt, earlier):
    tokenizer, template = copy.deepcopy(stock), prompt.chat_template()
    if earlier:
        names = {"START": "start", "END": "end", "SEPARATOR": "separator", "LATER": "later_separator"}
        quoted = {key: json.dumps(getattr(prompt, name), ensure_ascii=False) for key, name in names.items()}
        template = re.sub("|".join(quoted), lambda found: quoted[found[0]], EARLIER_TEMPLATE)
    tokenizer.chat_template = template
    assert format_of_template(tokenizer) == prompt


@pytest.mark.parametrize(
    "template",
    [
        None,
        "",
        "{{ messages }}",
        "{% if",
        "{{ raise_exception('no') }}",
        "{{ messages[9]['content'] }}",
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        "{% for m in messages %}{{ '问：' if m.role == 'user' else '答：' }}{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<s>{% endif %}",
        "{% for m in messages[:2] %}{{ m.content }}</s>{% endfor %}",
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
    ],
)
def test_other_templates_are_no_prompt_format(stock, template):
    tokenizer = copy.deepcopy(stock)
    tokenizer.chat_template = template
    assert format_of_template(tokenizer) is None


def test_a_template_made_elsewhere_can_be_a_prompt_format(stock):
    tokenizer = copy.deepcopy(stock)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    assert format_of_template(tokenizer) == PromptFormat(start="", separator="</s>", later_separator="</s>")


def test_a_format_is_shown_by_its_name_or_its_strings():
    assert [str(prompt) for prompt in PRESETS.values()] == list(PRESETS)
    assert json.loads(str(CUSTOM)) == vars(CUSTOM)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"start": "<s>问："}, "start"),
        ({"separator": "\n</s>"}, "separator"),
        ({"later_separator": ""}, "later_separator"),
        ({"end": "</s>\n"}, "end"),
    ],
)
def test_control_strings_that_would_merge_with_text_are_refused(stock, change, message):
    with pytest.raises(FireflyError, match=f"^prompt format: {message} .*special token"):
        PromptEncoder(stock, PromptFormat(**change))


@pytest.mark.parametrize(
    ("special", "message"),
    [
        ({**SPECIAL, "pad_token": None}, "no pad_token <pad>"),
        ({**SPECIAL, "pad_token": "</s>"}, "pad_token and eos_token are the same"),
        ({**SPECIAL, "bos_token": "<bos>"}, "bos_token is '<bos>', not '<s>'"),
    ],
)
def test_wrong_special_tokens_are_named(stock, special, message):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=copy.deepcopy(stock.backend_tokenizer), **special)
    with pytest.raises(FireflyError) as raised:
        check_special_tokens(tokenizer)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_prompt_format_by_name():
    assert prompt_format("firefly_single") == PromptFormat("<s>", "</s>", "</s>", "</s>")
    assert prompt_format(CUSTOM) is CUSTOM
    with pytest.raises(FireflyError, match="'nonsense'; there are firefly, firefly_turns, firefly_single"):
        prompt_format("nonsense")
