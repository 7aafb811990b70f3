"""The card of a model: ``README.md`` in its folder, which people read and a hub shows, with the plot of its losses."""

import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import ModelCardData
from torch import Tensor

from firefly_lightning.callbacks.run_figures import draw_losses
from firefly_lightning.checkpoints.history import History
from firefly_lightning.console import escaped, markdown
from firefly_lightning.errors import shown as printable
from firefly_lightning.evaluation.result_tables import filled_table, last_values
from firefly_lightning.files.published import CARD
from firefly_lightning.huggingface import LICENSE
from firefly_lightning.publishing.origin import Origin

PLOT = "loss.png"
"""Name of the plot that the card shows."""

_QUESTION = "写一首关于春天的诗。"

_WHOLE = """\
from transformers import pipeline

chat = pipeline("text-generation", "{name}")  # the folder, or OWNER/NAME on a hub
answer = chat([{{"role": "user", "content": "{question}"}}], return_full_text=False)
print(answer[0]["generated_text"])"""

_ADAPTER = """\
from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model, tokenizer = (one.from_pretrained("{name}") for one in (AutoPeftModelForCausalLM, AutoTokenizer))
chat = pipeline("text-generation", model, tokenizer=tokenizer)
print(chat([{{"role": "user", "content": "{question}"}}], return_full_text=False)[0]["generated_text"])"""

_LICENCE = """\
Bloom's weights are under the [BigScience BLOOM RAIL License 1.0](https://huggingface.co/spaces/bigscience/license), and
so is what is made of them: the restrictions on use in its Attachment A hold for this model too, and go with it wherever
it goes. The data has licences of its own; name them here."""

_OWN_LICENCE = "The weights were trained from random ones. Choose a licence, and name those of the data."

_LIMITS = """\
- A small model says what is likely, which is often wrong. Do not rely on its facts, its sums, or its advice on health,
  law and money.
- It knows Chinese and English; of other languages its vocabulary has only pieces.
- It repeats what is in its data, with the views and the slips that are there. Nobody has trained it to refuse.
- {longest}It has been tried on the rows above, and on no benchmark."""


class _Made(NamedTuple):
    """What a folder holds, in the words of its card."""

    name: str
    parameters: int
    tokens: int
    dtype: str
    is_adapter: bool


def write_card(
    folder: Path, name: str, weights: Mapping[str, Tensor], description: Mapping[str, Any], origin: Origin
) -> None:
    """Writes the card of a model and, where its losses are known, their plot.

    Args:
        folder: The folder of the model.
        name: The name that the folder will have.
        weights: The weights in the folder; those of an adapter where it holds one alone.
        description: Contents of the other files of the model's Hugging Face folder, by their names.
        origin: What is known of how it was made.
    """
    made = _Made(
        name,
        parameters=sum(weight.numel() for weight in weights.values()),
        tokens=description["config.json"]["vocab_size"],
        dtype=str(next(iter(weights.values())).dtype).removeprefix("torch."),
        is_adapter="transformer.word_embeddings.weight" not in weights,
    )
    curves = origin.history.curves if origin.history else {}
    losses = {name: {step - 1: value for step, value in curve.points.items()} for name, curve in curves.items()}
    if plotted := bool(losses.get("train_loss")):
        draw_losses(losses, folder / PLOT)
    sections = "\n\n".join(_sections(made, origin, plotted))
    (folder / CARD).write_text(f"---\n{_front_matter(made, origin)}\n---\n\n{sections}\n", encoding="utf-8")


def _front_matter(made: _Made, origin: Origin) -> str:
    sources = origin.history.sources if origin.history else []
    data = ModelCardData(
        language=["zh", "en"],
        license=None if origin.from_scratch else LICENSE,
        library_name="peft" if made.is_adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=origin.base if "/" in origin.base else None,
        datasets=[name for name in sources if "/" in name] or None,
        tags=["bloom", "firefly", "conversational", *(["lora"] if made.is_adapter else [])],
    )
    return str(data.to_yaml()).strip()


def _sections(made: _Made, origin: Origin, plotted: bool) -> Iterator[str]:
    history = origin.history or History()
    yield "<!-- Written by firefly export. Read it, and change what you know better. -->"
    yield f"# {made.name}"
    yield "\n".join(_summary(made, origin))
    quoted = made.name.replace("\\", "\\\\").replace('"', '\\"')
    use = (_ADAPTER if made.is_adapter else _WHOLE).format(name=quoted, question=_QUESTION)
    yield f"## Use\n\n```python\n{use}\n```\n\nor, in a terminal, `firefly chat --model {shlex.quote(made.name)}`."
    if history.kinds:
        yield f"## Data\n\n{', '.join(escaped(printable(name)) for name in history.sources)}"
        yield markdown(filled_table(("kind", "rows", "tokens", "tokens learned"), _counted(history)))
        if float(origin.settings.get("data.val_fraction") or 0):
            yield "These are all rows of the files, those that were held out for validation among them."
    if history.figures or plotted:
        yield "## Figures"
    if history.figures:
        of_what = "the loss is the mean of pairs" if origin.of_pairs else "losses are means in nats per target token"
        yield f"Of the validation after step {history.figures_step:,}; {of_what}:"
        figures = {name: {0: value} for name, value in history.figures.items()}
        yield from map(markdown, last_values(figures, "val", history.figures_rows))
    if plotted:
        yield f"![Loss by step]({PLOT})"
    releases = ((f"{name} (package)", release) for name, release in history.versions.items())
    if settings := [*origin.settings.items(), *releases]:
        yield f"## Settings\n\n{markdown(filled_table(('setting', ''), settings))}"
    yield f"## Licence\n\n{_OWN_LICENCE if origin.from_scratch else _LICENCE}"
    length = origin.settings.get("data.max_length")
    longest = f"It was trained on rows of at most {length} tokens. " if length else ""
    yield f"## Limits\n\n{_LIMITS.format(longest=longest)}"


def _summary(made: _Made, origin: Origin) -> Iterator[str]:
    what, of = ("An adapter that makes a Bloom", "的适配器") if made.is_adapter else ("A Bloom that is", "")
    size = f"{made.parameters:,} weights in {made.dtype} and a vocabulary of {made.tokens:,}"
    yield f"{what} a Chinese and English chat model, with {size}."
    yield f"一个中英文对话模型（Bloom{of}），{made.parameters:,} 个参数，词表 {made.tokens:,}。"
    if origin.base:
        begun = "random weights in the shape of" if origin.from_scratch else "the weights of"
        yield f"It began with {begun} {escaped(printable(origin.base))}."
    if origin.adapter is not None:
        kind, rank = origin.adapter.get("peft_type", "adapter"), origin.adapter.get("r")
        yield f"Trained was an adapter, {kind}{f' of rank {rank}' if rank else ''}; the other weights were not."
    if origin.steps:
        learned = "only the tokens of answers were learned, and of texts all"
        if origin.of_pairs:
            learned = "learned was which of two answers is preferred"
        yield f"{origin.steps:,} optimizer steps; {learned}."


def _counted(history: History) -> Iterator[tuple[str, ...]]:
    columns = ("rows", "tokens", "target_tokens")
    for kind, numbers in history.kinds.items():
        yield kind, *(f"{numbers.get(name, 0):,}" for name in columns)
    totals = [sum(numbers.get(name, 0) for numbers in history.kinds.values()) for name in columns]
    yield "all", *(f"{total:,}" for total in totals)
