"""Values of environment variables in a configuration, spelt as OmegaConf spells them."""

import os
import re
from typing import Any

import yaml

from firefly_lightning.errors import FireflyError

_VARIABLE = re.compile(r"\$\{oc\.env:\s*(\w+)\s*(?:,\s*([^}]*?)\s*)?\}")


def fill_in(content: str) -> str:
    """A configuration in which ``${oc.env:NAME}`` and ``${oc.env:NAME,DEFAULT}`` have their values.

    A value stands for itself and not for YAML: what is in it cannot add keys. Without quotes around it, it may be a
    number. Comments stay as they are.

    Raises:
        FireflyError: If a variable is not set and has no default.
    """
    if not _VARIABLE.search(content):
        return content
    root = yaml.compose(content)
    for node in _scalars(root):
        if _VARIABLE.search(node.value):
            node.value = _VARIABLE.sub(_value, node.value)
            if node.style is None:
                resolver: Any = yaml.SafeLoader("")  # untyped
                node.tag = resolver.resolve(yaml.ScalarNode, node.value, (True, False))
    return yaml.serialize(root, allow_unicode=True)


def _scalars(root: yaml.Node | None) -> list[yaml.ScalarNode]:
    """All texts and numbers below a node, each once, however often an alias names it."""
    found: dict[int, yaml.Node] = {}
    pending = [root] if root is not None else []
    while pending:
        node = pending.pop()
        if id(node) not in found:
            found[id(node)] = node
            children = node.value if isinstance(node, yaml.CollectionNode) else []
            pending += [one for child in children for one in (child if isinstance(child, tuple) else (child,))]
    return [node for node in found.values() if isinstance(node, yaml.ScalarNode)]


def _value(found: re.Match[str]) -> str:
    value = os.environ.get(found[1], found[2])
    if value is None:
        raise FireflyError(f"{found[0]}: {found[1]} is not set; set it, or write ${{oc.env:{found[1]},DEFAULT}}")
    return value
