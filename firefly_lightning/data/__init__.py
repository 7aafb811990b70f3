"""From files of instruction rows to the micro-batches of every optimizer step."""
