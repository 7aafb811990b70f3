"""Writes a GGUF, tensor by tensor, in a type of llama.cpp's."""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.gguf.layout import ENDS, GgufTensor
from firefly_lightning.gguf.words import Words
from firefly_lightning.huggingface import LICENSE

CONTEXT = 2048
"""Tokens of a context, for which Bloom was trained; ALiBi has no limit of its own."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "bf16": 32}
"""Numbers of the types of files (``enum llama_ftype``)."""

_MOST = 65504.0
"""The largest number of float16."""

_BLOCK_ROWS = 1024
"""Rows of a matrix that are converted at a time: quantising takes several times their memory."""


def write_gguf(
    path: Path,
    tensors: list[GgufTensor],
    words: Words,
    description: Mapping[str, Any],
    config: BloomConfig,
    kind: str,
    name: str,
    where: str,
    tell: Callable[[int, int], object],
) -> None:
    """Writes a file that llama.cpp reads.

    Args:
        path: The file, which is written over.
        tensors: All tensors; each is loaded when its turn comes.
        words: The tokens and their rules.
        description: Contents of the other files of a Hugging Face folder, by their names.
        config: Configuration of the model.
        kind: Type of the matrices. Embedding and head stay in ``q8_0`` beside a type of 4 or 5 bits, and matrices whose
            rows are no multiple of 32 in ``f16``.
        name: Name of the model, which programs show.
        where: Name of the model in messages.
        tell: Is called with the bytes that are written and all that will be.

    Raises:
        FireflyError: If a weight is not finite or too large for the type, or no token ends an answer.
        OSError: If the file cannot be written.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "bloom")
    _describe(
        writer, config, description["generation_config.json"], name, sum(int(np.prod(one.shape)) for one in tensors)
    )
    writer.add_file_type(_FILE_TYPES[kind])
    if kind.startswith("q"):
        writer.add_quantization_version(2)
    _add_words(writer, words, description)
    types = {one.name: _type_of(one, kind) for one in tensors}
    sizes = {}
    for one in tensors:
        written = gguf.GGMLQuantizationType[types[one.name].upper()]
        shape = gguf.quant_shape_to_byte_shape(one.shape, written)
        sizes[one.name] = int(np.prod(shape))
        writer.add_tensor_info(one.name, shape, np.dtype(np.uint8), sizes[one.name], written)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        done = 0
        for one in tensors:
            writer.write_tensor_data(_converted(_checked(one, types[one.name], where), types[one.name]))
            tell(done := done + sizes[one.name], sum(sizes.values()))
    except OSError as error:
        # numpy says how many numbers it has written, and not why it has stopped.
        raise error if error.errno else OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
    finally:
        writer.close()


def _describe(writer: Any, config: BloomConfig, generation: Mapping[str, Any], name: str, parameters: int) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(f"{parameters / 1e9:.1f}B" if parameters >= 1e9 else f"{max(1, round(parameters / 1e6))}M")
    writer.add_license(LICENSE)
    writer.add_languages(["zh", "en"])
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(4 * config.hidden_size)
    writer.add_block_count(config.n_layer)
    writer.add_head_count(config.n_head)
    writer.add_head_count_kv(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)
    _describe_sampling(writer, generation)


def _describe_sampling(writer: Any, generation: Mapping[str, Any]) -> None:
    """Says how tokens are chosen, also where Hugging Face's own default holds: those of llama.cpp are others."""
    if not generation.get("do_sample"):
        writer.add_sampling_temp(0.0)  # the likeliest token
    else:
        for key, field, default in (("temp", "temperature", 1.0), ("top_k", "top_k", 50), ("top_p", "top_p", 1.0)):
            value = generation.get(field)
            getattr(writer, f"add_sampling_{key}")(default if value is None else value)
        writer.add_sampling_min_p(0.0)
        writer.add_sampling_sequence("penalties;temperature;top_k;top_p")
    writer.add_sampling_penalty_repeat(generation.get("repetition_penalty") or 1.0)
    writer.add_sampling_penalty_last_n(-1)  # of all tokens that are there


def _add_words(writer: Any, words: Words, description: Mapping[str, Any]) -> None:
    config = description["tokenizer_config.json"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    writer.add_token_types(words.types)
    writer.add_token_merges(words.merges)
    for name, number in special_numbers(description, words.tokens).items():
        getattr(writer, f"add_{name}_token_id")(number)
    # The template writes them where training has them.
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    if isinstance(template := config.get("chat_template"), str):
        # A tag of transformers, which marks what an assistant says and changes nothing of it.
        writer.add_chat_template(template.replace("{% generation %}", "").replace("{% endgeneration %}", ""))


def special_numbers(description: Mapping[str, Any], tokens: list[str]) -> dict[str, int]:
    """Numbers of special tokens by the names that a GGUF has for them; ``eot`` is a second one that ends an answer.

    Args:
        description: Contents of the files of a Hugging Face folder, by their names: the settings of generation win over
            the configuration, and that over the tokenizer's.
        tokens: All tokens.

    Raises:
        FireflyError: If no token ends an answer, or more than two do.
    """
    given = description["generation_config.json"], description["config.json"]
    known: dict[str, int] = {}
    for name in ("bos", "eos", "unk", "pad"):
        found: Any = next((one for fields in given if (one := fields.get(f"{name}_token_id")) is not None), None)
        if found is None:
            token = description["tokenizer_config.json"].get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            found = tokens.index(token) if token in tokens else None
        first, *others = found if isinstance(found, list) else [found]
        if first is not None:
            known[name] = first
        if name == "eos" and others:
            if len(others) > 1:
                raise FireflyError(
                    f"eos_token_id {found}: llama.cpp ends answers at two tokens at most; leave some out"
                )
            known["eot"] = others[0]
    if "eos" not in known:
        raise FireflyError("no token ends an answer; set eos_token_id in generation_config.json")
    return known


def _type_of(tensor: GgufTensor, kind: str) -> str:
    if len(tensor.shape) < 2:
        return "f32"
    if kind.startswith("q") and tensor.shape[-1] % 32:
        return "f16"
    if tensor.name in ENDS and kind.startswith(("q4", "q5")):
        return "q8_0"
    return kind


def _converted(tensor: Tensor, kind: str) -> npt.NDArray[np.uint8]:
    """The bytes of a tensor in a type of llama.cpp's; rows, (rows, bytes of a row)."""
    import gguf

    if kind == "f32" and tensor.dtype == torch.float32:
        return tensor.contiguous().numpy().reshape(len(tensor), -1).view(np.uint8)
    written = gguf.GGMLQuantizationType[kind.upper()]
    rows = tensor.reshape(len(tensor), -1) if tensor.dim() > 1 else tensor.reshape(1, -1)
    out = np.empty(gguf.quant_shape_to_byte_shape(rows.shape, written), np.uint8)
    for start, block in _blocks(rows):
        out[start : start + len(block)] = gguf.quantize(block, written).view(np.uint8)
    return out


def _blocks(rows: Tensor) -> Iterator[tuple[int, npt.NDArray[np.float32]]]:
    for start in range(0, len(rows), _BLOCK_ROWS):
        yield start, rows[start : start + _BLOCK_ROWS].to(torch.float32).contiguous().numpy()


def _checked(tensor: GgufTensor, kind: str, where: str) -> Tensor:
    """The values of a tensor, all of them finite and such as the type can hold.

    Raises:
        FireflyError: If one is not.
    """
    values = tensor.load()
    low, high = (float(end) for end in torch.aminmax(values))
    if not (math.isfinite(low) and math.isfinite(high)):
        raise FireflyError(f"{where}: {tensor.source} has numbers that are not finite; take an earlier state of it")
    # The scale of a block is float16 too, of at least the largest number's 16th part.
    most = {"f32": math.inf, "bf16": math.inf, "f16": _MOST}.get(kind, 8 * _MOST)
    if max(-low, high) > most:
        raise FireflyError(f"{where}: {tensor.source} has numbers too large for {kind}; take bf16 or f32")
    return values
