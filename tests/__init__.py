"""Tests; none of them goes to the network."""

import os

# Set before huggingface_hub is imported, which reads it once: a name of the hub is not asked for, again and again.
os.environ["HF_HUB_OFFLINE"] = "1"
