"""What is wrong with an adapter that a user has written and nothing could be made of, in a line."""

import inspect
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from firefly_lightning.errors import reason

_WHOLE = "an adapter of peft's own is one value, {class_path: peft.LoraConfig, init_args: {r: 8}}"


def what_is_wrong(adapter: Any) -> str:
    """What to say of an adapter that is none: a class or key that there is not, or a value that a key cannot have.

    Args:
        adapter: What jsonargparse made of the value of ``model.adapter``.
    """
    # A flag of a key comes from jsonargparse with key and text, keys of a file as a mapping.
    keys = {adapter.key: yaml.safe_load(str(adapter.val))} if hasattr(adapter, "key") else adapter
    keys = keys.as_dict() if hasattr(keys, "as_dict") else keys
    known = ", ".join(_VALUES)
    if isinstance(keys, Mapping) and "class_path" in keys:
        return _of_class(str(keys["class_path"]), keys.get("init_args") or {})
    for key, value in keys.items() if isinstance(keys, Mapping) else ():
        if key not in _VALUES:
            return f"model.adapter.{key}: no key of lora ({known}); {_WHOLE}"
        fits, what = _VALUES[key]
        if not fits(value):
            return f"model.adapter.{key}: {shown(value)} is not {what}; {_WHOLE}"
    ways = f"lora, keys of it ({known}), or class_path: peft.LoraConfig with its init_args"
    return f"model.adapter {shown(adapter)}: no adapter; write {ways}"


def shown(value: Any) -> str:
    """A value in at most 60 characters."""
    text = str(value)
    return text if len(text) <= 60 else text[:59] + "…"


def _of_class(path: str, given: Any) -> str:
    """What is wrong with the class of an adapter's configuration, or with what it is made of."""
    import peft

    classes = {
        name: kind
        for name, kind in vars(peft).items()
        if isinstance(kind, type) and issubclass(kind, peft.PeftConfig) and kind is not peft.PeftConfig
    }
    name = path.rpartition(".")[2]
    if name not in classes:
        return f"model.adapter.class_path {path}: peft has no such configuration{_meant(name, classes)}"
    kind, where = classes[name], f"model.adapter.init_args: {name}"
    if not isinstance(given, Mapping):
        return f"{where} is made of keys and values, not of {shown(given)}"
    known = inspect.signature(kind).parameters
    if unknown := [key for key in given if key not in known]:
        return f"model.adapter.init_args.{unknown[0]}: no key of {name}{_meant(unknown[0], known)}"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "adapter")
    for key, value in given.items():
        try:
            parser.parse_object({"adapter": {key: value}})
        except Exception:  # of several types, by what the value is
            annotation = str(known[key].annotation).replace("typing.", "")
            return f"model.adapter.init_args.{key}: {shown(value)} is not what {name} takes there, {annotation}"
    try:
        kind(**given)
    except Exception as error:  # of many types, by the method
        return f"{where} cannot be made of this ({reason(error)})"
    return f"{where} cannot be used; take peft.LoraConfig"


def _meant(name: str, known: Any) -> str:
    near = get_close_matches(name, list(known), 1)
    if near or len(known) > 20:
        return f"; did you mean {near[0]}?" if near else "; the documentation of peft lists all"
    return f"; there are {', '.join(known)}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "rank": (
        lambda value: isinstance(value, int) and not isinstance(value, bool),
        "a whole number; write one such as 8",
    ),
    "alpha": (_is_number, "a number; write one such as 16"),
    "dropout": (_is_number, "a number; write one such as 0.05"),
    "target_modules": (
        lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
        "a list of names; write one such as [query_key_value, dense]",
    ),
}
"""For each key of ``Lora``, whether a value has its type, and what it must be, in words."""
