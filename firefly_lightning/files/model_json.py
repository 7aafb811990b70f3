"""The JSON files of a model's folder: read once for every command, with checks of the fields that are used.

Anybody may have written such a file. What is wrong with a field is said with the names of file and field, rather than
by whatever library meets the value first.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from firefly_lightning.errors import FireflyError, MissingFileError, some
from firefly_lightning.files.json_object import read_json_object

Check = tuple[Callable[[Any], bool], str]
"""Whether a field's value can be used, and what it must be, in words."""

CURE = "mend it or fetch it again"

TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("merges.txt", "chat_template.jinja", "chat_template.json"),
)
"""Files that can belong to a tokenizer; the first is always there."""

FLOATS = ("temperature", "repetition_penalty", "top_p", "typical_p", "min_p", "length_penalty")
"""Settings of generation for which transformers takes 2.0 and refuses 2."""


def read_config(file: Path) -> dict[str, Any]:
    """The fields of a Bloom's ``config.json``, those that are used checked; fractions may be written as whole numbers.

    Raises:
        FireflyError: If the file is no configuration of a Bloom, or a field has a value that no Bloom can have.
    """
    fields = read_json_object(file, CURE)
    check_config(fields, file)
    return fields | {name: float(fields[name]) for name in _FRACTIONS if name in fields}


def check_config(fields: Mapping[str, Any], where: str | Path) -> None:
    """Checks the fields of a Bloom's configuration that are used.

    Args:
        fields: The fields by name; what is left out has its default.
        where: Name of the file, which opens the message.

    Raises:
        FireflyError: If it is of another model, or a field has a value that no Bloom can have.
    """
    if (kind := fields.get("model_type")) != "bloom":
        name = kind if isinstance(kind, str) else "nameless"
        raise FireflyError(f"{where}: is a {name[:40]} model; only Bloom models can be used")
    _check(fields, _CONFIG, where)
    hidden = fields.get("n_embed") or fields.get("hidden_size", 64)
    heads = fields.get("num_attention_heads") or fields.get("n_head", 8)  # the older names win, as in transformers
    if hidden % heads:
        raise FireflyError(f"{where}: hidden_size {hidden} is no multiple of n_head {heads}; {CURE}")


def read_generation_config(file: Path) -> dict[str, Any]:
    """The fields of a ``generation_config.json``, those that are used checked.

    Raises:
        FireflyError: If a field has a value that cannot be used, or asks for what answers are not made with here.
    """
    fields = read_json_object(file, CURE)
    check_generation_config(fields, file)
    return fields


def check_generation_config(fields: Mapping[str, Any], where: str | Path) -> None:
    """Checks the settings of generation that are used.

    Args:
        fields: The settings by name; None is as if the setting were left out.
        where: Name of the file, which opens the message.

    Raises:
        FireflyError: If a setting has a value that cannot be used, or asks for what answers are not made with here.
    """
    given = {name: value for name, value in fields.items() if value is not None}
    if given.get("temperature") == 0 and not given.get("do_sample"):
        del given["temperature"]  # a way to say that answers are not sampled
    _check(given, _GENERATION, where)
    if asked := [name for name in _NOT_HERE if not _changes_nothing(name, given.get(name))]:
        raise FireflyError(f"{where}: {some(asked)} cannot be used here; take it out")


def read_index(file: Path, whole: bool = True) -> list[str]:
    """Names of the files of weights that an index lists, all of them files beside the index.

    Args:
        file: The index.
        whole: Whether the files must be there, as they are not while those of the hub are fetched.

    Raises:
        FireflyError: If the file is no index of weights, or a file that it lists is missing.
    """
    weights = read_json_object(file, CURE).get("weight_map")
    if not isinstance(weights, dict) or not weights or not all(map(_is_file_name, weights.values())):
        raise FireflyError(f"{file}: is no index of weights, which maps their names to files beside it; fetch it again")
    names = sorted(set(weights.values()))
    if whole and (missing := [name for name in names if not (file.parent / name).is_file()]):
        raise FireflyError(f"{file.parent}: {some(missing)} of {file.name} missing; download the rest")
    return names


def check_index(folder: Path) -> None:
    """Checks that a folder has the weights of a model, and their index where they are in several files.

    Raises:
        MissingFileError: If there are no weights.
        FireflyError: If the index is none of weights, or a file that it lists is missing.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return
        if (index := folder / f"{name}.index.json").is_file():
            read_index(index)
            return
    raise MissingFileError(f"{folder}: has no weights, model.safetensors or pytorch_model.bin; fetch them")


def layers_beyond(count: int, names: Iterable[str]) -> list[str]:
    """Names of the weights that belong to a layer after the first ``count`` ones, in order."""
    layers = ((re.match(r"(transformer\.)?h\.(\d+)\.", name), name) for name in names)
    return sorted(name for layer, name in layers if layer and int(layer[2]) >= count)


def adapter_base(folder: Path) -> str | None:
    """What an adapter's folder says of its base, a folder or hub name; None where a folder holds no adapter alone.

    Args:
        folder: The folder; one that has the weights of a whole model too is not an adapter's.

    Raises:
        FireflyError: If the adapter does not say its base.
    """
    file = folder / "adapter_config.json"
    patterns = ("model*.safetensors*", "pytorch_model*.bin*")
    if not file.is_file() or any(True for pattern in patterns for _ in folder.glob(pattern)):
        return None
    base = read_json_object(file, CURE).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise FireflyError(f"{file}: does not name the adapter's base; set base_model_name_or_path to its folder")
    beside = folder / base
    return str(beside) if not Path(base).is_dir() and beside.is_dir() else base


def refuse_adapter(folder: Path, name: str) -> None:
    """Refuses a folder that holds an adapter, such as a LoRA, and no whole model.

    Args:
        folder: The folder.
        name: How messages call it.

    Raises:
        FireflyError: If it is an adapter's.
    """
    if base := adapter_base(folder):
        raise FireflyError(
            f"{name}: is an adapter of {base}, not a whole model; merge them: firefly export --checkpoint {name} "
            "--out FOLDER"
        )


def _check(fields: Mapping[str, Any], checks: Mapping[str, Check], where: str | Path) -> None:
    for name, value in fields.items():
        usable, words = checks.get(name, (_anything, ""))
        if not usable(value):
            raise FireflyError(f"{where}: {name} is {_shown(value)}, not {words}; {CURE}")


def _shown(value: Any) -> str:
    """A value as JSON, cut where it is long."""
    if isinstance(value, dict | list):
        return f"a {type(value).__name__}"
    text = json.dumps(value, default=lambda value: type(value).__name__)
    return text if len(text) <= 40 else text[:39] + "…"


def _anything(value: Any) -> bool:
    return True


def _count(least: int, most: int) -> Check:
    return lambda value: type(value) is int and least <= value <= most, f"a whole number from {least} to {most:,}"


def _number(least: float, most: float, beyond: bool = False) -> Check:
    """A number in a range; ``beyond`` says that it must be greater than ``least``."""

    def usable(value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return number and (least < value if beyond else least <= value) and value <= most

    return usable, f"a number {'above' if beyond else 'from'} {least:g} {'up ' if beyond else ''}to {most:g}"


def _is_id(value: Any) -> bool:
    return value is None or _ID[0](value)


def _are_ids(value: Any) -> bool:
    return _is_id(value) or (isinstance(value, list) and bool(value) and all(map(_ID[0], value)))


def _changes_nothing(name: str, value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value is None or value is False or (number and value == _NEUTRAL.get(name))


def _are_listed_ids(value: Any) -> bool:
    return isinstance(value, list) and _are_ids(value)


def _are_lists_of_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_are_listed_ids, value))


def _is_type(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value.removeprefix("torch.") in _TYPES)


def _is_file_name(value: Any) -> bool:
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")


_TYPES = ("float32", "float16", "bfloat16", "float64", "auto")
_ID = _count(0, 2**31 - 1)
_BOOL: Check = (lambda value: isinstance(value, bool), "true or false")
_PARTS, _SHARE, _ABOVE = _count(1, 10_000), _number(0, 1), _number(0, 1e6, beyond=True)

_FRACTIONS = ("hidden_dropout", "attention_dropout", "layer_norm_epsilon", "initializer_range")

_CONFIG: dict[str, Check] = {
    "vocab_size": _count(1, 10**8),
    "hidden_size": _count(1, 10**6),
    "n_embed": (lambda value: value is None or _count(1, 10**6)[0](value), "a whole number from 1 to 1,000,000"),
    **dict.fromkeys(("n_layer", "num_hidden_layers", "n_head", "num_attention_heads", "pretraining_tp"), _PARTS),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), _SHARE),
    "layer_norm_epsilon": _number(0, 1, beyond=True),
    "initializer_range": _number(0, 1000),
    **dict.fromkeys(
        ("tie_word_embeddings", "use_cache", "slow_but_exact", "apply_residual_connection_post_layernorm"), _BOOL
    ),
    **dict.fromkeys(("torch_dtype", "dtype"), (_is_type, f"one of {', '.join(_TYPES)}")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (_is_id, "a token's number")),
    "eos_token_id": (_are_ids, "a token's number"),
}
"""Of ``config.json``: the fields of which the model is made, and the older names of some."""

_GENERATION: dict[str, Check] = {
    **dict.fromkeys(("max_new_tokens", "max_length", "num_beams"), _count(1, 10**9)),
    **dict.fromkeys(("min_new_tokens", "min_length", "top_k", "no_repeat_ngram_size"), _count(0, 10**9)),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values"), _BOOL),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "true, false or never"),
    **dict.fromkeys(("temperature", "repetition_penalty", "max_time"), _ABOVE),
    **dict.fromkeys(("top_p", "epsilon_cutoff", "eta_cutoff", "min_p"), _SHARE),
    **dict.fromkeys(("typical_p", "top_h"), _number(0, 1, beyond=True)),
    "length_penalty": _number(-1e6, 1e6),
    "bad_words_ids": (_are_lists_of_ids, "lists of token numbers"),
    **dict.fromkeys(("bos_token_id", "pad_token_id", "forced_bos_token_id"), (_is_id, "a token's number")),
    **dict.fromkeys(
        ("eos_token_id", "forced_eos_token_id"),
        (_are_ids, "a token's number, or some"),
    ),
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens"), (_are_listed_ids, "some numbers of tokens")),
}
"""Of ``generation_config.json``: the settings that ``model.decoding`` has too, and those that stand in most folders."""

_NEUTRAL = {
    **dict.fromkeys(("num_return_sequences", "guidance_scale", "num_beam_groups", "encoder_repetition_penalty"), 1),
    **dict.fromkeys(("diversity_penalty", "encoder_no_repeat_ngram_size", "penalty_alpha"), 0),
}
"""Numbers with which a setting below changes nothing, as some folders write it out."""

_NOT_HERE = (
    "stop_strings", "constraints", "force_words_ids", "num_return_sequences", "return_dict_in_generate",
    "output_scores", "output_logits", "output_attentions", "output_hidden_states", "penalty_alpha", "guidance_scale",
    "num_beam_groups", "diversity_penalty", "dola_layers", "prompt_lookup_num_tokens", "assistant_early_exit",
    "is_assistant", "token_healing", "watermarking_config", "cache_implementation", "cache_config", "sequence_bias",
    "exponential_decay_length_penalty", "compile_config", "custom_generate", "encoder_repetition_penalty",
    "encoder_no_repeat_ngram_size", "forced_decoder_ids", "low_memory", "use_mtp", "prefill_chunk_size",
)  # fmt: skip
"""Settings that answers are not made with: they need more than a prompt, or give something else than token ids."""
