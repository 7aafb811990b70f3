import copy
import pickle

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from firefly_lightning.errors import FireflyError
from firefly_lightning.prompt import PRESETS, PromptEncoder, PromptFormat, check_special_tokens, prompt_format
from tests.conftest import SPECIAL, tiny_tokenizer

SEPARATORS = {
    "firefly": ("</s></s>", "</s>"),
    "firefly_turns": ("</s></s>", "</s></s>"),
    "firefly_single": ("</s>",) * 2,
}
ROWS = [
    [("上联：春风又绿江南岸", "下联：明月何时照我还")],
    [("你好", "世界 😀"), (" hello\n", "world"), ("", " 还 ")],
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


@pytest.mark.parametrize("turns", ROWS)
@pytest.mark.parametrize("prompt", [*PRESETS.values(), CUSTOM], ids=[*PRESETS, "custom"])
def test_chat_template_gives_the_ids_of_training(stock, prompt, turns):
    encoder = PromptEncoder(stock, prompt)
    messages = [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]

    def apply(messages, **kwargs):
        return stock.apply_chat_template(messages, chat_template=prompt.chat_template(), return_dict=False, **kwargs)

    assert apply(messages) == encoder.encode([turns])[0].input_ids
    asked = apply(messages[:-1], add_generation_prompt=True)
    assert asked == encoder.encode_question(turns[:-1], turns[-1][0])


def test_chat_template_refuses_what_training_never_saw(stock):
    for roles in (["system", "user"], ["assistant"], ["user", "user"]):
        messages = [{"role": role, "content": "你好"} for role in roles]
        with pytest.raises(jinja2.TemplateError, match="alternate"):
            stock.apply_chat_template(messages, chat_template=PRESETS["firefly"].chat_template())


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
