"""What the catalogue says of strategies is what registry, classes, configurations and documentation say."""

import re
from importlib import import_module
from importlib.metadata import metadata
from itertools import pairwise

import pytest
import yaml
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch.strategies import StrategyRegistry

from firefly_lightning import strategies
from firefly_lightning.strategies.catalogue import BY_NAME, CATALOGUE, CLASS_PATHS, name_of, reader_of
from firefly_lightning.strategies.registration import load_class, register
from tests.support.helpers import ROOT

OWN = [strategy.name for strategy in CATALOGUE if strategy.own]


def test_lightning_knows_each_strategy_of_this_project():
    registry = _StrategyRegistry()
    register(registry)
    assert registry.available_strategies() == OWN
    assert len(OWN) == len(set(OWN)) == len(CATALOGUE) - len(["auto", "ddp"])
    for name in OWN:
        assert StrategyRegistry[name]["init_params"] == registry[name]["init_params"] == BY_NAME[name].options
        assert StrategyRegistry[name]["description"] == registry[name]["description"] != ""
    with pytest.raises(ValueError, match="'zero1' is already present in the registry"):
        register(registry)
    registry.remove("zero1")
    assert registry.available_strategies() == OWN[1:]


def test_each_has_a_configuration_that_means_it():
    files = sorted((ROOT / "configs" / "strategy").glob("*.yaml"))
    assert [file.stem for file in files] == sorted(OWN)
    for file in files:
        given = yaml.safe_load(file.read_text("utf-8"))["trainer"]["strategy"]
        name = given if isinstance(given, str) else name_of(given["class_path"], given["init_args"])
        assert name == file.stem
        if not isinstance(given, str):
            assert load_class(given["class_path"]) is load_class(BY_NAME[name].class_path)


def tables(text: str) -> list[list[list[str]]]:
    """Cells of each row of each table, its heading first."""
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    return [[[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()] for block in blocks]


def test_the_documentation_has_a_row_for_each_that_says_what_is_sharded():
    texts = [file.read_text("utf-8") for file in (ROOT / "README.md", *(ROOT / "docs" / "en").glob("*.md"))]
    found = [table for text in texts for table in tables(text) if table[0][1:2] == ["what it splits or moves"]]
    for table in found:  # a short one may have several in a row
        assert [name for row in table for name in re.findall(r"`(\w+)`", row[0])] == list(BY_NAME)
    (table,) = (table for table in found if table[0][2] == "when to take it")
    rows = {name.strip("`"): said.split(";")[0] for name, said, *_ in table[2:]}
    assert rows.keys() == BY_NAME.keys()
    for name, said in rows.items():
        other = re.match("as `(.+?)`", said)
        if other or "layer" in said or said.startswith("nothing"):
            expected = BY_NAME[other[1]].shards if other else {"layers"} if "layer" in said else set()
        else:
            expected = set(said.split(", "))
        assert BY_NAME[name].shards == expected, name


def test_classes_are_imported_when_they_are_asked_for():
    assert sorted(strategies.__all__) == sorted(CLASS_PATHS) == sorted({BY_NAME[name].class_name for name in OWN})
    for name, path in CLASS_PATHS.items():
        assert getattr(strategies, name) is load_class(path)
        assert name in dir(strategies)
    with pytest.raises(AttributeError, match=r"module 'firefly_lightning.strategies' has no attribute 'Nothing'"):
        _ = strategies.Nothing


def test_a_name_is_found_by_the_class_and_its_arguments():
    for strategy in CATALOGUE[1:]:
        assert name_of(strategy.class_path, strategy.options) == strategy.name
    assert name_of("firefly_lightning.strategies.ZeroStrategy", {}) == "zero2", "DeepSpeedStrategy's own default"
    assert name_of("firefly_lightning.strategies.GeminiStrategy", {"offload_optim_frac": 0.5}) == "gemini_offload"
    assert name_of("elsewhere.GeminiStrategy", {}) == "gemini"
    assert name_of("elsewhere.Other", {"stage": 1}) == "elsewhere.Other"


def test_engines_have_readers_and_extras_that_there_are():
    extras = metadata("firefly-lightning").get_all("Provides-Extra")
    engines = {strategy.engine.name: strategy.engine for strategy in CATALOGUE}
    assert len(engines) == 4
    for name, engine in engines.items():
        assert engine.extra is None or engine.extra in extras
        assert reader_of(name) == engine.reader
        if engine.reader:
            assert callable(import_module(engine.reader).read_weights)
    assert reader_of("unknown") is None is reader_of(None)


def test_what_shards_more_is_named_later():
    """Names of tables and figures, from whole models on."""
    stages = [BY_NAME[name].shards for name in ("auto", "ddp", "zero1", "zero2", "zero3")]
    assert all(fewer < more for fewer, more in pairwise(stages))
