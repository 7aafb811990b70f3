"""A run under torchrun goes on with the nodes that are left, row for row and loss for loss."""

import signal

import pytest

from tests.integration.test_parity import relative
from tests.support.elastic import ElasticRun
from tests.support.helpers import logged
from tests.support.nodes import nodes
from tests.support.reference import Trained
from tests.support.strategies import BATCH_SIZE, CLIP, LEARNING_RATE, WARMUP
