"""Reads the READMEs and the pages of the documentation for tests: their blocks of code, in the reader's order."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.support.helpers import ROOT, run

READMES = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}
DOCS = ROOT / "docs"

NOT_HERE = (
    "pip install ",
    "pip uninstall ",
    "VLLM_CPU_KVCACHE_SPACE=",
    "npm install ",
    "bin/demo",
    "bin/test",
    "mkdocs build",
    "export HF_ENDPOINT=",
    "hf download ",
    "hf auth login",
    "firefly push ",
    "python -c 'from modelscope ",
)
"""Beginnings of commands that tests leave out, since they need a network or minutes; the hub's tests run the pushes.

`.ci/run` runs the scripts among them, which install the package and build the pages."""


class Block(NamedTuple):
    """A fenced block of code: its language, the file it belongs to, and its lines without comments."""

    language: str
    path: str | None  # the path that a first line "# path" names
    code: str


def pages(language: str) -> list[Path]:
    """Pages of the documentation in a language, in the order of the navigation, which must name all of them."""
    found = [DOCS / language / name for name in listed(yaml.safe_load((ROOT / "mkdocs.yml").read_text("utf-8"))["nav"])]
    assert sorted(found) == sorted((DOCS / language).glob("**/*.md"))
    return found


def listed(navigation: list | dict | str) -> list[str]:
    """Names of the pages in a part of the navigation, in its order."""
    if isinstance(navigation, str):
        return [navigation]
    parts = navigation.values() if isinstance(navigation, dict) else navigation
    return [page for part in parts for page in listed(part)]


def documents(language: str) -> list[Path]:
    """The README and the pages of the documentation in a language."""
    return [READMES[language], *pages(language)]


def page(name: str, language: str = "en") -> str:
    """The text of a page of the documentation."""
    return (DOCS / language / f"{name}.md").read_text("utf-8")


def read_blocks(document: Path) -> list[Block]:
    blocks = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", document.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        path = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        lines = (re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in re.sub(r" *\\\n *", " ", text).splitlines())
        blocks.append(Block(language, path and path[1], "\n".join(line for line in lines if line) + "\n"))
    return blocks


def commands(blocks: list[Block]) -> list[str]:
    return [line for block in blocks if block.language == "bash" for line in block.code.splitlines()]


def write_file(box: Path, block: Block) -> None:
    """Writes a block into its file in the folder ``box``; a configuration must be one that firefly-fit takes."""
    path = box / block.path
    path.parent.mkdir(exist_ok=True)
    path.write_text(block.code, "utf-8")
    if block.language == "yaml" and path.parent == box:
        parsed = run("firefly-fit", "fit", "--model.path", "x", "--config", path, "--print_config").stdout
        for group, fields in yaml.safe_load(block.code).items():
            assert fields.keys() <= yaml.safe_load(parsed)[group].get("init_args", yaml.safe_load(parsed)[group]).keys()
