"""Makes a GGUF of a model: from its description and what gives its weights, to a file that is whole or not there."""

import os
from pathlib import Path

from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import BloomConfig

from firefly_lightning.errors import FireflyError
from firefly_lightning.files.atomic import new_file
from firefly_lightning.gguf.checking import check_texts
from firefly_lightning.gguf.layout import check_architecture, tensors_of
from firefly_lightning.gguf.model import Model
from firefly_lightning.gguf.words import read_words
from firefly_lightning.gguf.writing import write_gguf
from firefly_lightning.pruning.vocabulary import read_texts


def make_gguf(model: Model, out: Path, kind: str, verify: str | None) -> None:
    """Writes a model as GGUF, and says what it has written.

    Args:
        model: The model.
        out: The new file.
        kind: Type of the matrices.
        verify: File of texts, on which the tokens of file and model are compared before the file takes its name.

    Raises:
        FireflyError: If llama.cpp cannot have such a model, a text has other tokens, or the file cannot be written.
    """
    config = BloomConfig.from_dict(model.description["config.json"])
    check_architecture(config, model.where)
    tokenizer_json = model.description["tokenizer.json"]
    rows = model.shapes["transformer.word_embeddings.weight"][0]
    words = read_words(tokenizer_json, rows, model.where)
    tensors = tensors_of(model.weights, model.shapes, config, model.where)
    if words.normalizes:
        print("note: the tokenizer puts text into the form NFC, llama.cpp does not; give it text in that form")
    checked = ""
    with (
        new_file(out, [*model.inputs, *([verify] if verify else [])]) as file,
        tqdm(unit="B", unit_scale=True, desc=out.name, delay=2) as bar,
    ):

        def tell(done: int, all_bytes: int) -> None:
            bar.total = all_bytes
            bar.update(done - bar.n)

        partial = Path(file.name)
        write_gguf(partial, tensors, words, model.description, config, kind, out.stem, model.where, tell)
        if verify:
            texts, tokens = check_texts(partial, Tokenizer.from_str(tokenizer_json), read_texts(verify), verify)
            checked = f"; {texts:,} texts have the same {tokens:,} tokens as in the model"
        if os.path.lexists(out):
            raise FireflyError(f"{out}: has been made meanwhile; choose another name")
    size = out.stat().st_size / 1e6
    print(f"{out}: a GGUF of {rows:,} tokens in {kind}, {size:,.1f} MB, cut as {words.pre}{checked}")
