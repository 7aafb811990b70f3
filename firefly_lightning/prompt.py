"""How turns become token ids: the exact format of training, of generation and of the exported chat template."""

import copy
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from firefly_lightning.errors import FireflyError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

Turn = tuple[str, str]
"""One exchange: (input, target)."""

SPECIAL_TOKENS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
"""Bloom's special tokens, in the order of their ids 0 to 3."""


@dataclass(frozen=True)
class PromptFormat:
    """Control strings around inputs and targets.

    A row reads ``start input separator target end``, each later turn ``input later_separator target end``. Targets and
    their ``end`` are learned, nothing else is. Control strings are read as special tokens; what a user wrote never is.

    Args:
        start: String before the first turn.
        separator: String between the first input and its target.
        later_separator: String between the input and the target of every later turn.
        end: String after every target.

    Raises:
        FireflyError: If a string holds half a surrogate pair.
    """

    start: str = "<s>"
    separator: str = "</s></s>"
    later_separator: str = "</s>"
    end: str = "</s>"

    def __post_init__(self) -> None:
        for name, text in vars(self).items():
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise FireflyError(f"prompt format: {name} holds half a surrogate pair, which is no character; mend it")

    def __str__(self) -> str:
        """Name of the format, or its control strings where it has none."""
        names = [name for name, preset in PRESETS.items() if preset == self]
        return names[0] if names else json.dumps(vars(self), ensure_ascii=False)

    def chat_template(self) -> str:
        """Jinja template with which ``apply_chat_template`` gives the ids of training for user/assistant messages.

        A system message is a line before the first question, as in training. A content may be a list of parts of text.
        What training has no form for raises an error: other roles or orders, tools, documents. There is one difference
        to training: special tokens typed inside a message are read as special tokens.
        """
        # A JSON string is a Jinja string too, as long as it needs no surrogate pairs.
        quoted = {name: json.dumps(value, ensure_ascii=False) for name, value in vars(self).items()}
        return "".join(f"{{% set {name} = {value} %}}" for name, value in quoted.items()) + _CHAT_TEMPLATE


_CHAT_TEMPLATE = (
    "{% macro text(content) %}"
    "{% if content is string %}{{ content }}"
    "{% elif content is undefined or content is mapping or content is not sequence %}"
    "{{ raise_exception('the content of a message must be text, or a list of parts of text') }}"
    "{% else %}{% for part in content %}"
    "{% if part is mapping and part['type'] == 'text' and part['text'] is string %}{{ part['text'] }}"
    "{% else %}{{ raise_exception('only parts of text can be read, as {type: text, text: ...}') }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% endmacro %}"
    "{% if tools or documents %}"
    "{{ raise_exception('this model was trained without tools and documents; leave them out') }}"
    "{% endif %}"
    "{% set so_far = namespace(system='', messages=0) %}"
    "{{ start }}"
    "{% for message in messages %}"
    "{% if message['tool_calls'] %}"
    "{{ raise_exception('this model was trained without tools; leave tool_calls out') }}"
    "{% elif message['role'] in ('system', 'developer') and so_far.messages == 0 %}"
    "{% set instruction = text(message['content']) %}"
    "{% if instruction %}{% set so_far.system = so_far.system ~ instruction ~ '\\n' %}{% endif %}"
    "{% elif message['role'] != ('user' if so_far.messages % 2 == 0 else 'assistant') %}"
    "{{ raise_exception('after a system message, if any, messages must alternate user, assistant, user, ...') }}"
    "{% elif message['role'] == 'user' %}"
    "{{ so_far.system }}{{ text(message['content']) }}"
    "{% if not loop.last or add_generation_prompt %}"
    "{{ later_separator if so_far.messages else separator }}"
    "{% endif %}"
    "{% set so_far.system = '' %}{% set so_far.messages = so_far.messages + 1 %}"
    "{% else %}"
    # What lies between these marks is what training learns; return_assistant_tokens_mask of transformers gives it.
    "{% generation %}{{ text(message['content']) }}{{ end }}{% endgeneration %}"
    "{% set so_far.messages = so_far.messages + 1 %}"
    "{% endif %}"
    "{% endfor %}"
    "{% if so_far.messages == 0 %}{{ raise_exception('there is no user message to answer') }}{% endif %}"
)
"""What every chat template has after the control strings; in ASCII, since some readers take the locale's encoding."""


PRESETS = {
    # The published form; rows with later turns carry them inside `target`, joined by a literal single </s>.
    "firefly": PromptFormat(),
    # Every turn has the published form of the first one.
    "firefly_turns": PromptFormat(later_separator="</s></s>"),
    # The form of the later Firefly releases.
    "firefly_single": PromptFormat(separator="</s>"),
}
"""Prompt formats that can be chosen by name."""


def prompt_format(prompt: str | PromptFormat) -> PromptFormat:
    """The prompt format that was given, or the preset of the given name.

    Raises:
        FireflyError: If there is no such preset.
    """
    if isinstance(prompt, PromptFormat):
        return prompt
    if prompt not in PRESETS:
        raise FireflyError(f"data.prompt: no format is called {prompt!r}; there are {', '.join(PRESETS)}")
    return PRESETS[prompt]


class EncodedRow(NamedTuple):
    """Token ids of a row and, for each, whether it is learned."""

    input_ids: list[int]
    target_mask: list[bool]


class ControlIds(NamedTuple):
    """Token ids of a format's control strings; see :class:`PromptFormat`."""

    start: list[int]
    separator: list[int]
    later_separator: list[int]
    end: list[int]


class PromptEncoder:
    """Encodes turns into token ids, with one tokenizer and one prompt format.

    Args:
        tokenizer: A fast tokenizer, which must have ``<unk>``, ``<s>``, ``</s>`` and ``<pad>``, all different.
        prompt: The prompt format.

    Attributes:
        controls: Ids of the format's control strings.
        bos_token_id: Id of ``<s>``.
        eos_token_id: Id of ``</s>``.
        pad_token_id: Id of ``<pad>``.

    Raises:
        FireflyError: If the tokenizer lacks a token that it must have, or a control string begins or ends with an
            ordinary token.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", prompt: PromptFormat) -> None:
        check_special_tokens(tokenizer)
        self.prompt = prompt
        self.bos_token_id: int = tokenizer.bos_token_id
        self.eos_token_id: int = tokenizer.eos_token_id
        self.pad_token_id: int = tokenizer.pad_token_id
        # A copy, because the settings below must not reach the tokenizer that a user holds.
        self.backend = copy.deepcopy(tokenizer.backend_tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()
        self.controls = ControlIds(*map(self._control_ids, ControlIds._fields))
        # From here on "</s>" typed by a user is four ordinary characters, not the end of a turn.
        self.backend.encode_special_tokens = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        # tokenizers leaves this setting out when it copies or pickles, as for a data loader's worker.
        self.__dict__.update(state)
        self.backend.encode_special_tokens = True

    def encode(self, rows: Sequence[Sequence[Turn]]) -> list[EncodedRow]:
        """Encodes rows, each a sequence of turns. All texts go through the tokenizer in one parallel batch."""
        texts = self.encode_texts([text for turns in rows for turn in turns for text in turn])
        stream = iter(texts)
        return [self._join([(next(stream), next(stream)) for _ in turns]) for turns in rows]

    def encode_question(self, turns: Sequence[Turn], question: str) -> list[int]:
        """Ids of past turns followed by a question, up to where the answer begins."""
        ids = self.encode([turns])[0].input_ids if turns else list(self.controls.start)
        separator = self.controls.later_separator if turns else self.controls.separator
        return ids + self.encode_texts([question])[0] + separator

    def encode_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of plain texts; special tokens typed in them stay text."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def decode_turn(self, prompt_ids: Sequence[int], target_ids: Sequence[int]) -> Turn:
        """Input and target text of the turn that is asked; where the row was cut, the text ends there.

        Earlier turns, where there are any, stand before the input with the control tokens that part them.

        Args:
            prompt_ids: Token ids of the row up to its first learned target.
            target_ids: Token ids of this target.
        """
        ids, separators = list(prompt_ids), (self.controls.separator, self.controls.later_separator)
        separator = next((one for one in separators if ids[-len(one) :] == one), separators[0])
        source = _between(self.controls.start, ids, separator)
        target = _between([], list(target_ids), self.controls.end)
        return str(self.backend.decode(source, skip_special_tokens=False)), self._decode(target)

    def _decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=True))

    def _join(self, turns: Iterable[tuple[list[int], list[int]]]) -> EncodedRow:
        ids, mask = list(self.controls.start), [False] * len(self.controls.start)
        for index, (source, target) in enumerate(turns):
            given = source + (self.controls.later_separator if index else self.controls.separator)
            learned = target + self.controls.end
            ids += given + learned
            mask += [False] * len(given) + [True] * len(learned)
        return EncodedRow(ids, mask)

    def _control_ids(self, name: str) -> list[int]:
        text = getattr(self.prompt, name)
        ids = list(self.backend.encode(text, add_special_tokens=False).ids)
        borders = ids[-1:] if name == "start" else [*ids[:1], *ids[-1:]]
        special = {index for index, token in self.backend.get_added_tokens_decoder().items() if token.special}
        if not special.issuperset(borders) or not (ids or name == "start"):
            raise FireflyError(f"prompt format: {name} {text!r} must begin and end with a special token such as </s>")
        return ids


def _between(before: list[int], ids: list[int], after: list[int]) -> list[int]:
    first = len(before) if ids[: len(before)] == before else 0
    last = len(ids) - (len(after) if ids[-len(after) :] == after else 0)
    return ids[first:last]


def format_of_template(tokenizer: "PreTrainedTokenizerFast") -> PromptFormat | None:
    """The prompt format whose chat template a tokenizer has, of whichever release of this project, or made elsewhere.

    Returns:
        What the template puts around messages; None where there is no template, or one that is not of the form of a
        :class:`PromptFormat` whose control strings are special tokens of this tokenizer.
    """
    if not tokenizer.chat_template:
        return None
    texts = [f"message number {number} of a conversation" for number in range(4)]
    messages = [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(texts)]
    try:
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
    except Exception:  # a template can raise whatever it likes
        return None
    found = re.fullmatch("(.*)".join(["", *map(re.escape, texts), ""]), whole, re.DOTALL)
    if found is None:
        return None
    start, separator, end, later_separator, last = found.groups()
    prompt = PromptFormat(start, separator, later_separator, end)
    if (end, start + texts[0] + separator) != (last, asked):
        return None
    try:
        return PromptEncoder(tokenizer, prompt).prompt
    except FireflyError:
        return None


def check_special_tokens(tokenizer: "PreTrainedTokenizerFast") -> None:
    """Checks that Bloom's four special tokens are there and differ.

    Raises:
        FireflyError: If one is missing or has another text, or two share an id: padding that is the end token too
            would hide every end.
    """
    where = tokenizer.name_or_path or "the tokenizer"
    missing = [f"{name} {token}" for name, token in SPECIAL_TOKENS.items() if getattr(tokenizer, name) is None]
    if missing:
        raise FireflyError(
            f"{where}: the tokenizer has no {', '.join(missing)}; add them to tokenizer.json and tokenizer_config.json"
        )
    names: dict[int, str] = {}
    for name in SPECIAL_TOKENS:
        other = names.setdefault(getattr(tokenizer, f"{name}_id"), name)
        if other != name:
            raise FireflyError(
                f"{where}: {name} and {other} are the same token {getattr(tokenizer, name)!r}; "
                "give each its own in tokenizer_config.json"
            )
    foreign = [
        f"{name} is {getattr(tokenizer, name)!r}, not {token!r}"
        for name, token in SPECIAL_TOKENS.items()
        if getattr(tokenizer, name) != token
    ]
    if foreign:
        raise FireflyError(f"{where}: {'; '.join(foreign)}; rename it in tokenizer.json and tokenizer_config.json")
