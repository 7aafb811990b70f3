"""Files and globs to tokenised rows: the one way that training, evaluation and prediction take."""

from collections.abc import Sequence
from pathlib import Path

from firefly_lightning.data.row_arrays import TooLong
from firefly_lightning.data.sources.records import find_sources
from firefly_lightning.data.sources.row_forms import RowRules
from firefly_lightning.data.token_cache import tokenize
from firefly_lightning.data.tokenized_rows import TokenizedRows
from firefly_lightning.errors import FireflyError
from firefly_lightning.prompt import PromptEncoder


def tokenized_files(
    files: Sequence[str],
    encoder: PromptEncoder,
    max_length: int,
    too_long: TooLong,
    cache_dir: Path,
    rules: RowRules,
    stride: int = 1,
    kind: type[TokenizedRows] = TokenizedRows,
) -> TokenizedRows:
    """The rows of files, tokenised where the cache lacks them.

    Args:
        files: Files, globs and names of datasets.
        encoder: Turns the texts of rows into token ids.
        max_length: Most tokens of a row.
        too_long: What is done with a longer instruction row.
        cache_dir: The folder of all cache folders.
        rules: How rows are read.
        stride: Tokens that two windows of a longer document share.
        kind: Class of the result.

    Raises:
        FireflyError: If a file cannot be read, or nothing of any row can be learned.
    """
    sources = find_sources(files)
    folders = [tokenize(one, encoder, max_length, too_long, cache_dir, rules, stride) for one in sources]
    rows = kind(folders, sources)
    if len(rows):
        return rows
    names, lost = ", ".join(sources), sum(of["no_target"] for counts in rows.counts for of in counts.values())
    if lost == sum(of["rows"] for counts in rows.counts for of in counts.values()) and _short(rows, max_length):
        raise FireflyError(f"{names}: no row has a target that is learned; see data.learn and the rows' own weights")
    raise FireflyError(
        f"{names}: no row has a target within {max_length} tokens; raise data.max_length or change data.too_long"
    )


def _short(rows: TokenizedRows, max_length: int) -> bool:
    """Whether no row was too long."""
    return not any(of["truncated"] or of["dropped"] for counts in rows.counts for of in counts.values())
