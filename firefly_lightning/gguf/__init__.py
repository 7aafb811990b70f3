"""GGUF files, which llama.cpp and the programs around it read: one file with weights, words and settings.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""
