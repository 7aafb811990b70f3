"""Strategies of engines train like one process of plain PyTorch too; see `test_parity.py`."""

import pytest

from tests.integration.test_parity import ENGINES, trains_like_plain_pytorch


@pytest.mark.parametrize("strategy", ENGINES)
def test_a_strategy_trains_like_plain_pytorch(strategy, fit_args, expected, rows_file, tmp_path):
    trains_like_plain_pytorch(strategy, fit_args, expected, rows_file, tmp_path)
