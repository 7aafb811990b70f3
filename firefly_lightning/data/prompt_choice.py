"""Which prompt format a run has: the one it is told, or else its checkpoint's, or else its model's, or ``firefly``."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from firefly_lightning.checkpoints.layout import DESCRIPTION_KEY
from firefly_lightning.checkpoints.torch_file import load_file, trainer_file
from firefly_lightning.errors import FireflyError
from firefly_lightning.huggingface import load_prompt_format, load_tokenizer
from firefly_lightning.prompt import PRESETS, PromptFormat, format_of_template

USUAL = PRESETS["firefly"]
"""The format of a run where neither the user, nor a checkpoint, nor the model's folder names one."""


def choose_format(
    told: PromptFormat | None,
    path: str,
    tokenizer: PreTrainedTokenizerFast,
    say: Callable[[str], object],
    checkpoint: str | Path | None = None,
) -> PromptFormat:
    """Chooses the prompt format of rows, and says what nobody would expect of the choice.

    Args:
        told: The format that the user names, if any.
        path: Folder or hub name of the model.
        tokenizer: The model's tokenizer, whose chat template says the format where nothing else does.
        say: Prints a line.
        checkpoint: The checkpoint that the run begins with, if any.

    Raises:
        FireflyError: If a file that should say the format is damaged.
    """
    where, own = str(checkpoint), saved_format(Path(checkpoint)) if checkpoint else None
    if told is not None and own is not None:  # check_same_format compares them when the checkpoint is loaded
        return told
    if own is None:
        where, own = path, own_format(path, tokenizer)
    if told is not None:
        if own not in (None, told):
            hint = "leave the prompt format out to keep that"
            say(f"note: rows are put into {told}, but {where} was trained with {own}; {hint}")
        return told
    if own is None and tokenizer.chat_template:
        say(f"note: {path} has a chat template that is no prompt format; rows are put into {USUAL}")
    elif own not in (None, USUAL):
        say(f"prompt format: {own}, which is that of {where}")
    return own or USUAL


def own_format(path: str, tokenizer: PreTrainedTokenizerFast) -> PromptFormat | None:
    """The format that a model was trained with: that of ``prompt_format.json``, or else of its chat template.

    Args:
        path: Folder or hub name of the model.
        tokenizer: Its tokenizer.

    Raises:
        FireflyError: If ``prompt_format.json`` is malformed.
    """
    return load_prompt_format(path) or format_of_template(tokenizer)


def tokenizer_and_format(path: str) -> tuple[PreTrainedTokenizerFast, PromptFormat]:
    """The tokenizer of a model and the format that it was trained with; ``firefly`` where its folder does not say.

    Raises:
        FireflyError: If one of them cannot be read.
    """
    tokenizer = load_tokenizer(path)
    return tokenizer, own_format(path, tokenizer) or USUAL


def saved_format(checkpoint: Path) -> PromptFormat | None:
    """The format of the run that saved a checkpoint; None where another program saved it.

    Raises:
        FireflyError: If the checkpoint is damaged.
    """
    file = trainer_file(checkpoint)
    return described_format(load_file(file, "cpu").get(DESCRIPTION_KEY)) if file.is_file() else None


def described_format(description: Any) -> PromptFormat | None:
    """The prompt format in the description that a checkpoint carries; None where it has none of a known form."""
    fields = description.get("prompt_format.json") if isinstance(description, Mapping) else None
    try:
        strings = isinstance(fields, Mapping) and all(isinstance(text, str) for text in fields.values())
        return PromptFormat(**fields) if strings else None  # type: ignore[arg-type]
    except (TypeError, FireflyError):  # other fields, or no characters
        return None


def check_same_format(description: Any, trainer: Any) -> None:
    """Checks that the rows of a run have the prompt format of the checkpoint that it loads.

    Args:
        description: The description that the checkpoint carries.
        trainer: The trainer of the run, if any; nothing is checked where its data is not this project's.

    Raises:
        FireflyError: If a training is to go on with rows in another format; an evaluation says it, and goes on.
    """
    # Not at the top, since a conversation does without Lightning.
    from lightning.pytorch.utilities import rank_zero_info

    from firefly_lightning.data.protocol import data_of

    data, saved = data_of(trainer), described_format(description)
    if data is None or saved in (None, data.prompt):
        return
    if trainer.state.fn == "fit":
        raise FireflyError(
            f"data.prompt: the checkpoint was trained with {saved}, the rows of this run are in {data.prompt}; "
            f"resume with {saved}, or train the exported model anew"
        )
    rank_zero_info(f"note: rows are put into {data.prompt}, but the checkpoint was trained with {saved}")
