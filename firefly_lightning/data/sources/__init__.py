"""Records of files and datasets, and rows in their three forms."""
