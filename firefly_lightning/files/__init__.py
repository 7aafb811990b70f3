"""Files and folders that are written whole, in pieces that can be gone on with, or out of parts of others."""
