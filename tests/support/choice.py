"""What `.ci/run` leaves to `bin/test` and `bin/test --full`."""

import sys

DIVIDED = "--divided" in sys.argv
"""Whether each test is run in the stack that it is about, and as few combinations as show it; known before options are
parsed, since test modules make their parameters of it."""
