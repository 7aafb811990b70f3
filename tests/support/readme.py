"""The READMEs as the tests see them: their blocks of code."""

import re
from pathlib import Path
from typing import NamedTuple

import yaml

from tests.support.helpers import ROOT, run

ENGLISH, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"

NOT_HERE = ("pip install ", "bin/demo", "bin/test")
"""Commands that need a network and minutes: .ci/run runs the two scripts, and both install the package."""


class Block(NamedTuple):
    """A fenced block: its language, and its lines without comments."""

    language: str
    path: str | None  # of the file that a first line "# path" names
    code: str


def read_blocks(readme: Path) -> list[Block]:
    blocks = []
    for language, text in re.findall(r"^```(\w+)\n(.*?)^```$", readme.read_text("utf-8"), re.MULTILINE | re.DOTALL):
        path = re.match(r"# (\S+\.(?:py|yaml))\n", text)
        lines = (re.sub(r"(^|\s+)#.*", "", line).rstrip() for line in text.replace("\\\n", " ").splitlines())
        blocks.append(Block(language, path and path[1], "\n".join(line for line in lines if line) + "\n"))
    return blocks


def commands(blocks: list[Block]) -> list[str]:
    return [line for block in blocks if block.language == "bash" for line in block.code.splitlines()]


def write_file(box: Path, block: Block) -> None:
    """A block that begins with the name of its file; a configuration must be one that firefly-fit takes."""
    path = box / block.path
    path.parent.mkdir(exist_ok=True)
    path.write_text(block.code, "utf-8")
    if block.language == "yaml" and path.parent == box:
        parsed = run("firefly-fit", "fit", "--model.path", "x", "--config", path, "--print_config").stdout
        for group, fields in yaml.safe_load(block.code).items():
            assert fields.keys() <= yaml.safe_load(parsed)[group].get("init_args", yaml.safe_load(parsed)[group]).keys()
