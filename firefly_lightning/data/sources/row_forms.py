"""Rows to learn of files and Hugging Face datasets: their reader, which refuses or counts what cannot be learned.

:func:`firefly_lightning.data.sources.any_record.read_leniently` says of any record what it holds and what is wrong.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import xxhash

from firefly_lightning.data.sources.known_forms import form_of, no_form, with_open_target
from firefly_lightning.data.sources.records import DocumentPer, read_records
from firefly_lightning.data.sources.row_texts import BadRowError, Said, document_of, text_of
from firefly_lightning.errors import FireflyError, reason
from firefly_lightning.interrupts import Terminated
from firefly_lightning.prompt import Turn

RowFormat = Callable[[Mapping[str, Any]], tuple[str, Sequence[Turn] | str] | None]
"""A user's reader of rows: gives kind and turns from a row's fields, or kind and text of a document; None where the row
is in another form."""

Learn = Literal["all", "last"]
"""Which targets of a row are learned, of those that the row itself does not leave out: ``all``, or the ``last`` one."""


class Row(NamedTuple):
    """One row to learn: the turns of an instruction row, or a document.

    Attributes:
        kind: The task, as in the published data; ``Belle``, ``Conversation`` or ``Text`` where the source names none.
        turns: (input, target) pairs, at least one, no target empty unless the row is to be answered.
        number: The row's line in a ``.jsonl`` file, else its position in the source; from 1.
        unanswered: Whether a last turn without an answer was left out.
        learned: Whether each target is learned; empty where all are.
        document: Whether the row is a text that is learned as a whole, the target of its one turn; the input is empty.
    """

    kind: str
    turns: tuple[Turn, ...]
    number: int
    unanswered: bool = False
    learned: tuple[bool, ...] = ()
    document: bool = False

    @property
    def identity(self) -> int:
        """A hash of the row's text; neither the form that the row was in nor blanks make a difference."""
        if self.document:
            return xxhash.xxh3_64_intdigest("".join(self.turns[0][1].split()).encode())
        text = "\0".join("".join(part.split()) for turn in self.turns for part in turn)
        return xxhash.xxh3_64_intdigest(text.encode())


class Record(NamedTuple):
    """The rows of one record, where a user of this package reads records that hold several.

    Attributes:
        rows: The rows.
        unused: Names of the fields that hold text and are not read.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...] = ()


ReadRecord = Callable[[Mapping[str, Any], int], Record | None]
"""Gives the rows of a record from its fields and its number, or None where it is in one of the known forms."""


class RowRules(NamedTuple):
    """How rows are read.

    Attributes:
        row_format: Function for rows in a form of the user's own, which is asked first for every row.
        learn: Which targets are learned.
        answering: Whether rows are read to be answered: their targets may be empty or missing, and of a conversation
            whose last question is open, that one is asked.
        counting_faults: Whether a row that cannot be learned is counted and passed over, rather than refused; a source
            that begins with a row in no form is refused all the same, as it holds something else.
        document_per: What of a ``.txt`` file is a document.
        read: Function that is asked for the rows of every record, in the place of ``row_format`` and the known forms.
        together: Rows of a record, which are kept, left out and counted as one; ``read`` gives so many.
    """

    row_format: RowFormat | None = None
    learn: Learn = "all"
    answering: bool = False
    counting_faults: bool = False
    document_per: DocumentPer = "line"
    read: ReadRecord | None = None
    together: int = 1


class RowReader:
    """Streams the rows of one file or dataset, and counts what is not read of them.

    The form of each row is recognised from its fields; :mod:`firefly_lightning.data.sources.known_forms` has the table.

    Args:
        source: A source, as :func:`firefly_lightning.data.sources.records.find_sources` gives it.
        rules: How rows are read.

    Attributes:
        unused: By the name of a field that no form reads: in how many of the rows so far it held text.
        faults: Why rows so far were passed over, where they are counted.
    """

    def __init__(self, source: str, rules: RowRules | None = None) -> None:
        self.source, self.rules = source, rules or RowRules()
        self.unused: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()

    def __iter__(self) -> Iterator[Row]:
        """Reads the source anew.

        Raises:
            FireflyError: If the source is empty, or a row is in no known form or malformed; the message names file and
                line.
        """
        self.unused.clear()
        self.faults.clear()
        number, begun = 0, False
        for number, fields in read_records(self.source, self.rules.document_per):
            try:
                rows = self._rows(fields, number)
            except BadRowError as error:
                if not self.rules.counting_faults or (error.fault == "no form" and not begun):
                    raise FireflyError(f"{self.source}:{number}{error.place}: {error}") from error
                self.faults[error.fault] += 1
            else:
                yield from rows
            begun = True
        if not number:
            raise FireflyError(f"{self.source}: has no rows; remove it from the list or fill it")

    def _rows(self, fields: Mapping[str, Any], number: int) -> Sequence[Row]:
        record = self.rules.read(fields, number) if self.rules.read else None
        if record is None:
            return [self._read(fields, number)]
        self.unused.update(record.unused)
        return record.rows

    def _read(self, fields: Mapping[str, Any], number: int) -> Row:
        own = self.rules.row_format and _read_own(self.rules.row_format, fields)
        if own:
            kind, said = own
        else:
            fields = with_open_target(fields) if self.rules.answering else fields
            form = form_of(fields)
            if form is None:
                raise BadRowError(no_form(fields), "no form")
            kind, said = form.kind(fields), form.read(fields)
        if said.document and self.rules.answering:
            message = "a text is learned as it is and asks nothing; name files of questions, as in data.predict_files"
            raise BadRowError(message, "no question")
        row = _to_answer(kind, said, number) if self.rules.answering else _to_learn(kind, said, number)
        if said.unused:
            self.unused.update(said.unused)
        learned = self._learned(row)
        return row if learned is row.learned else row._replace(learned=learned)

    def _learned(self, row: Row) -> tuple[bool, ...]:
        """Whether each target is learned, by the row and the rules; a row that is to be answered has one at least."""
        learned = row.learned
        if self.rules.learn == "last" and len(row.turns) > 1:
            learned = (*(False for _ in row.turns[1:]), learned[-1] if learned else True)
        if self.rules.answering and learned and not any(learned):
            learned = (*learned[:-1], True)
        return learned


def read_rows(source: str, row_format: RowFormat | None = None) -> Iterator[Row]:
    """Streams the rows of one file or dataset; arguments and errors are those of :class:`RowReader`."""
    return iter(RowReader(source, RowRules(row_format)))


def _to_learn(kind: str, said: Said, number: int) -> Row:
    if not said.turns:
        raise nothing_to_learn()
    for index, (_, target) in enumerate(said.turns, 1):
        if not target.strip():
            turn = f" of turn {index}" if len(said.turns) > 1 else ""
            raise BadRowError(f"the target{turn} is empty, so there is nothing to learn; remove the row", "empty")
    return Row(kind, said.turns, number, said.question is not None, said.learned, said.document)


def _to_answer(kind: str, said: Said, number: int) -> Row:
    """A row to be answered: what comes before its first learned target is asked, an open question at its end first."""
    turns = said.turns if said.question is None else (*said.turns, (said.question, ""))
    is_open = len(turns) > 1 and not turns[-1][1].strip()
    learned = (*(False for _ in turns[1:]), True) if is_open else said.learned
    return Row(kind, turns, number, False, learned)


def nothing_to_learn() -> BadRowError:
    """The error of a row none of whose turns has an answer."""
    return BadRowError("no turn has an answer, so there is nothing to learn; remove the row", "empty")


def _read_own(row_format: RowFormat, fields: Mapping[str, Any]) -> tuple[str, Said] | None:
    """Kind and turns that a user's function gives, or None where it leaves the row to the known forms."""
    try:
        found = row_format(fields)
        if found is None:
            return None
        kind, said = found[0], found[1]
        if not isinstance(said, str):
            turns = [{"input": question, "target": answer} for question, answer in said]
    except Terminated:
        raise
    except (Exception, SystemExit) as error:
        named = f"{type(error).__name__}: {reason(error)}"
        message = f"the function of data.row_format failed, {named} (in {_name_of(row_format)}); mend it or the row"
        raise BadRowError(message, "malformed") from error
    if isinstance(said, str):
        return text_of({"kind": kind}, "kind"), document_of(text_of({"text": said}, "text"))
    if not turns:
        raise BadRowError("the function of data.row_format gave no turn; remove the row", "empty")
    texts = tuple((text_of(turn, "input"), text_of(turn, "target")) for turn in turns)
    return text_of({"kind": kind}, "kind"), Said(texts)


def _name_of(row_format: RowFormat) -> str:
    parts = (getattr(row_format, "__module__", None), getattr(row_format, "__qualname__", repr(row_format)))
    return ".".join(filter(None, parts))
