"""Files and folders that appear whole, are written in resumable pieces, or are put together from parts of others."""
