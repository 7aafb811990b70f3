"""A Bloom with its weights: whole, quantised, or of an adapter and its base."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import xxhash
from safetensors import SafetensorError, safe_open
from transformers import BloomConfig, BloomForCausalLM

from firefly_lightning.errors import FireflyError, reason, require, some
from firefly_lightning.files.hub import find_model_file
from firefly_lightning.files.manifest import digest_of
from firefly_lightning.files.model_json import (
    FLOATS,
    check_index,
    layers_beyond,
    read_config,
    read_generation_config,
    read_index,
)
from firefly_lightning.huggingface.folder import base_of, load_config, quiet_peft, quiet_transformers

Quantize = Literal["nf4", "int8"]
"""How quantised weights are kept: in 4 bits (NormalFloat, Dettmers et al., 2023), or in 8 with a scale for each row."""

_BASE_NAMES = {"transformer.word_embeddings.weight", "lm_head.weight"}
"""Weights of a base that peft saves with an adapter where it takes the vocabulary for a changed one."""


def check_model(path: str, from_scratch: bool = False) -> BloomConfig:
    """The configuration of a Bloom whose files are all there, without reading its weights.

    Args:
        path: Folder or hub name of the model, or of an adapter, whose base is then looked at too.
        from_scratch: Whether weights are not needed.

    Raises:
        FireflyError: If the model is no Bloom, its weights are not there, or its settings of generation are unusable.
    """
    config = load_config(path)
    if file := find_model_file(path, "generation_config.json"):
        read_generation_config(file)
    if base := base_of(path):
        _adapter_file(path)
        return check_model(base, from_scratch)
    if Path(path).is_dir() and not from_scratch:
        check_index(Path(path))
    return config


def load_bloom(
    path: str, dtype: torch.dtype, quantize: Quantize | None = None, compute_dtype: torch.dtype = torch.float32
) -> BloomForCausalLM:
    """A Bloom with all its weights; an adapter is merged into those of its base.

    Args:
        path: Folder or hub name of the model or the adapter.
        dtype: Type that the weights are converted to.
        quantize: How the weights of the linear layers of all blocks are kept; in ``dtype`` for None.
        compute_dtype: Type in which products with quantised weights are computed.

    Raises:
        FireflyError: If the model is no Bloom, its weights are missing, damaged, incomplete or of other sizes, its
            settings of generation cannot be used, or an adapter is to be quantised.
    """
    if base := base_of(path):
        if quantize:
            raise FireflyError(
                f"{path}: an adapter cannot be quantised; merge it first: firefly export --checkpoint {path}"
            )
        return _with_generation_config(_merged(load_bloom(base, dtype), path), path)
    config = check_model(path)
    # transformers 4.51 knows only the old name of the argument, 5 means to drop it.
    options: dict[str, Any] = {"torch_dtype" if transformers.__version__.startswith("4.") else "dtype": dtype}
    if quantize:
        options["quantization_config"] = _quantization(quantize, compute_dtype)
    # Fetched here, where a cut connection is mended, and the hub's answers have words of their own.
    folder = next((file.parent for file in weight_files(path)), path)
    try:
        with quiet_transformers():
            model, info = BloomForCausalLM.from_pretrained(folder, config=config, output_loading_info=True, **options)
    except Exception as error:  # whatever the readers of the several weight formats raise
        if quantize and "bnb_supported_devices" in str(error):
            release = f"transformers {transformers.__version__}"
            raise FireflyError(
                f"model.quantize {quantize}: {release} cannot do it on this device; take 5 or later"
            ) from error
        raise FireflyError(f"{path}: the weights cannot be read ({reason(error)}); fetch them again") from error
    # transformers would go on with random numbers in the place of missing weights, and without layers too many.
    if missing := sorted(info["missing_keys"]):
        raise FireflyError(f"{path}: the weights lack {some(missing)}; fetch them again")
    if layers := layers_beyond(config.n_layer, info["unexpected_keys"]):
        raise FireflyError(f"{path}: the weights have {some(layers)}, which config.json lacks; fetch both again")
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # bitsandbytes would pack weights anew, not those of any size
            module.support_avx512bf16_for_cpu = False
    for name in FLOATS:  # transformers refuses a temperature of 2, and takes 2.0
        if isinstance(value := getattr(model.generation_config, name, None), int):
            setattr(model.generation_config, name, float(value))
    return model


def stored_dtype(path: str) -> torch.dtype:
    """The type in which a model's folder says that its weights are; that of its base where an adapter is named.

    Args:
        path: Folder or hub name of the model or the adapter.
    """
    file = find_model_file(base_of(path) or path, "config.json")
    fields = read_config(file) if file else {}
    name = str(fields.get("dtype") or fields.get("torch_dtype") or "").removeprefix("torch.")
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(name, torch.float32)


def random_bloom(config: BloomConfig, dtype: torch.dtype) -> BloomForCausalLM:
    """A Bloom with weights drawn as Hugging Face draws them, from PyTorch's random state."""
    return BloomForCausalLM(config).to(dtype)


def weight_files(path: str) -> list[Path]:
    """The files of a model's weights, in order of their names; an adapter's follow those of its base.

    Args:
        path: Folder or hub name of the model or the adapter.
    """
    if base := base_of(path):
        return [*weight_files(base), _adapter_file(path)]
    for name in ("model.safetensors", "pytorch_model.bin"):
        if file := find_model_file(path, name):
            return [file]
        if index := find_model_file(path, f"{name}.index.json"):
            found = (find_model_file(path, part) for part in read_index(index, whole=False))
            files = [file for file in found if file]
            read_index(index)
            return files
    return []


def digest_of_weights(path: str) -> str:
    """A digest of the files of a model's weights, 32 hexadecimal digits, whatever the files and folders are called.

    Args:
        path: Folder or hub name of the model or the adapter.
    """
    digest = xxhash.xxh3_128()
    for file in weight_files(path):
        digest.update(digest_of(file).encode())
    return digest.hexdigest()


def digest_of_settings(path: str) -> str:
    """A digest of what, beside its weights, a model computes by: its ``config.json``, and an adapter's own.

    Args:
        path: Folder or hub name of the model or the adapter.
    """
    base, digest = base_of(path), xxhash.xxh3_128()
    for folder, name in ((base or path, "config.json"), *([(path, "adapter_config.json")] if base else [])):
        if file := find_model_file(folder, name):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def _quantization(quantize: Quantize, compute_dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype)


def _adapter_file(path: str) -> Path:
    """The weights of an adapter; not as a pickle, which some releases of peft would run.

    Raises:
        FireflyError: If they are not there.
    """
    file = find_model_file(path, "adapter_model.safetensors")
    if file is None:
        raise FireflyError(
            f"{path}: has no adapter_model.safetensors; fetch it, or save the adapter anew with a current peft"
        )
    return file


def _merged(model: BloomForCausalLM, path: str) -> BloomForCausalLM:
    """The model with the weights of an adapter merged into its own.

    Raises:
        FireflyError: If peft is missing, the adapter's files are damaged, or it is of a model of other sizes.
    """
    require("adapters", "peft")
    quiet_peft()
    import peft

    file = _adapter_file(path)
    try:
        with safe_open(file, framework="pt"):  # checks the sizes that the header gives
            pass
    except SafetensorError as error:
        raise FireflyError(f"{file}: is no complete safetensors file ({reason(error)}); fetch it again") from error
    try:
        with warnings.catch_warnings(), quiet_transformers():
            warnings.simplefilter("ignore")  # of layers new to peft, and of configurations of later releases
            adapted = peft.PeftModel.from_pretrained(model, file.parent)
            _check_adapter_weights(file, peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
            merged: BloomForCausalLM = adapted.merge_and_unload()
    except FireflyError:
        raise
    except Exception as error:  # of many types, by what does not fit
        raise FireflyError(f"{path}: cannot be merged into {base_of(path)} ({reason(error)})") from error
    vars(merged).pop("peft_config", None)  # some releases leave it
    merged.requires_grad_(True)  # it is a model like any other now, which peft has frozen
    return merged


def _check_adapter_weights(file: Path, expected: Mapping[str, Any]) -> None:
    """Checks that an adapter's file has what its configuration says: peft would go on with random weights.

    Raises:
        FireflyError: If weights are missing, none of the adapter's, or not finite.
    """
    with safe_open(file, framework="pt") as tensors:
        names = {name.removeprefix("base_model.model."): name for name in tensors.keys()}  # noqa: SIM118  (no mapping)
        wanted = {name.removeprefix("base_model.model.") for name in expected}
        for problem, others in (("lacks", wanted - names.keys()), ("has", names.keys() - wanted - _BASE_NAMES)):
            if others:
                raise FireflyError(
                    f"{file}: {problem} {some(sorted(others))}, unlike adapter_config.json; fetch both again"
                )
        for name in names.values():
            tensor = tensors.get_tensor(name)
            if not tensor.is_floating_point():
                raise FireflyError(f"{file}: {name} has whole numbers, no weights; fetch it again")
            if not bool(tensor.isfinite().all()):
                raise FireflyError(f"{file}: {name} has numbers that are not finite; take another checkpoint's adapter")


def _with_generation_config(model: BloomForCausalLM, path: str) -> BloomForCausalLM:
    """The model with the settings of generation that are in an adapter's folder, if any are."""
    if file := find_model_file(path, "generation_config.json"):
        read_generation_config(file)
        model.generation_config = transformers.GenerationConfig.from_pretrained(file.parent)
    return model
