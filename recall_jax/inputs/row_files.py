"""Read files of rows in the usual formats, a piece at a time."""

import codecs
import csv
import gzip
import io
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from recall_jax.errors import InputError, brief, reading, shown

Row = dict[str, Any]
# Selects the needed fields from those of a file.
Columns = Callable[[Sequence[str]], Sequence[str]]

LARGEST_ROW = 1 << 26  # characters; without a limit a row could be everything in a .gz
_PIECE = 1 << 18
_NEARLY_ALL = 8  # a truncated JSON word begins at most this many characters before its end
_GZIP = ".gz"
_BATCH = 64  # rows of a Parquet file decoded at a time


def iterate_rows(
    path: Path, *, columns: Columns | None = None, chosen: np.ndarray | None = None
) -> Iterator[Row]:
    """Yield the rows of a file, without blank lines, or only those numbered in `chosen`, ascending.

    A line of .txt is a row with the field `text`; .json holds a list of objects, or a sequence of
    them; .gz is decompressed. Of a .parquet file, only the fields selected by `columns` are read,
    and values without a Python type become text. Raises InputError for a missing, unreadable,
    malformed or empty file, with the line if there is one.
    """
    kind = _kind(path)
    with _faults_of(path):
        if kind == ".parquet":
            rows = _read_parquet(path, columns, chosen)
        else:
            rows = _chosen(_read_text(path, _READERS[kind]), chosen)
        empty = chosen is None
        for row in rows:
            empty = False
            yield row
    if empty:
        raise InputError(f"{path} holds no rows: give at least one")


def count_rows(path: Path) -> int:
    """Count the rows; reads all of them unless the file states it.

    Raises as `iterate_rows` does.
    """
    if _kind(path) == ".parquet":
        with _faults_of(path), _parquet(path) as file:
            if count := int(file.metadata.num_rows):
                return count
    return sum(1 for _ in iterate_rows(path))


def _kind(path: Path) -> str:
    """Return the suffix that states the format; InputError if it is unknown, or no file exists."""
    name = path.with_suffix("") if path.suffix.lower() == _GZIP else path
    kind = name.suffix.lower()
    if kind not in _READERS and (kind != ".parquet" or name is not path):
        known = ", ".join([*_READERS, ".parquet"])
        raise InputError(
            f"{path}: cannot read this kind of data file; use one of {known}; all but the last may "
            f"end in {_GZIP} too"
        )
    if not path.is_file():
        raise InputError(f"no data file {path}")
    return kind


def _chosen(rows: Iterator[Row], chosen: np.ndarray | None) -> Iterator[Row]:
    if chosen is None:
        yield from rows
        return
    wanted = iter(chosen.tolist())
    following = next(wanted, None)
    for number, row in enumerate(rows):
        if number == following:
            yield row
            following = next(wanted, None)
        if following is None:
            return


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    with reading(str(path)):
        try:
            yield
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text (byte {_fault(path)})") from error
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise InputError(f"{path} is no complete {_GZIP} file: {brief(error)}") from error


def _open(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == _GZIP else path.open("rb")


def _fault(path: Path) -> int:
    """Return the position of the first byte that is not UTF-8."""
    decoder, done = codecs.getincrementaldecoder("utf-8")(), 0
    with _open(path) as file:
        for piece in iter(lambda: file.read(_PIECE), b""):
            held = len(decoder.getstate()[0])
            try:
                decoder.decode(piece)
            except UnicodeDecodeError as error:
                return int(done - held + error.start)
            done += len(piece)
    return done


def _read_text(path: Path, reader: Callable[[TextIO, str], Iterator[Row]]) -> Iterator[Row]:
    # csv handles line ends itself
    newline = "" if reader is _read_csv else None
    with _open(path) as file, io.TextIOWrapper(file, "utf-8-sig", newline=newline) as text:
        yield from reader(text, str(path))


def _lines(file: TextIO, where: str) -> Iterator[str]:
    number = 1
    while line := file.readline(LARGEST_ROW + 1):
        if len(line) > LARGEST_ROW:
            raise _too_large(f"{where}, line {number}")
        yield line
        number += 1


def _too_large(where: str) -> InputError:
    return InputError(f"{where} has over {LARGEST_ROW:,} characters, too many for a row: split it")


def _read_txt(file: TextIO, where: str) -> Iterator[Row]:
    return ({"text": line.rstrip("\n")} for line in _lines(file, where) if line.strip())


def _read_jsonl(file: TextIO, where: str) -> Iterator[Row]:
    for number, line in enumerate(_lines(file, where), start=1):
        if line.strip():
            place = f"{where}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise _json_fault(error, place) from error
            yield _object(value, place)


def _read_json(file: TextIO, where: str) -> Iterator[Row]:
    """Yield the objects in a list, or those of a sequence."""
    scanner = _Scanner(file, where)
    first = scanner.next_character()
    if first == "":
        raise InputError(f"{where} is not JSON: it is empty")
    in_list = first == "["
    if in_list:
        scanner.skip()
        if scanner.next_character() == "]":
            scanner.skip()
            in_list = False
    number = 0
    while in_list or scanner.next_character():
        yield _object(scanner.value(), f"{where}, row {number}")
        number += 1
        if in_list:
            if (following := scanner.next_character()) not in (",", "]"):
                raise scanner.fault("Expecting ',' delimiter")
            scanner.skip()
            if following == "]":
                in_list = False
                if scanner.next_character():
                    raise scanner.fault("Extra data")


class _Scanner:
    """Scan JSON values in a file of which only a piece is in memory."""

    def __init__(self, file: TextIO, where: str) -> None:
        self._file, self._where = file, where
        self._text, self._place, self._passed = "", 0, 0

    def next_character(self) -> str:
        """Return the next character that is not white space, "" at the end, without skipping it."""
        while True:
            while self._place < len(self._text):
                if (character := self._text[self._place]) not in " \t\n\r":
                    return character
                self._place += 1
            if not self._more():
                return ""

    def skip(self) -> None:
        """Skip the next character."""
        self._place += 1

    def value(self) -> Any:
        """Read the next value of any type."""
        self.next_character()
        while True:
            try:
                value, self._place = _DECODER.raw_decode(self._text, self._place)
                return value
            except (ValueError, RecursionError) as error:
                if not (self._is_truncated(error) and self._more()):
                    raise _json_fault(error, self._where, self._passed) from error

    def fault(self, problem: str) -> InputError:
        """Return an error about the next character."""
        return InputError(f"{self._where} is not JSON: {problem} at character {self._at}")

    @property
    def _at(self) -> int:
        return self._passed + self._place

    def _is_truncated(self, error: Exception) -> bool:
        """Return whether a value may seem wrong only because the rest of it is not read yet."""
        if not isinstance(error, json.JSONDecodeError):
            return False
        if len(self._text) - self._place > LARGEST_ROW:
            raise _too_large(f"{self._where}, from character {self._at}") from error
        return "Unterminated" in error.msg or error.pos > len(self._text) - _NEARLY_ALL

    def _more(self) -> bool:
        """Read the next piece, doubling for a large value; return False at the end of the file."""
        piece = self._file.read(max(_PIECE, len(self._text) - self._place))
        if not piece:
            return False
        self._passed += self._place
        self._text, self._place = self._text[self._place :] + piece, 0
        return True


def _read_csv(file: TextIO, where: str) -> Iterator[Row]:
    csv.field_size_limit(LARGEST_ROW)
    reader = csv.DictReader(_lines(file, where), strict=True)
    try:
        names = reader.fieldnames or []
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{where} has two columns {shown(twice[0])}: rename one")
        for index, row in enumerate(reader):
            if None in row or None in row.values():
                raise InputError(f"{where}, row {index} does not have as many fields as the header")
            yield dict(row)
    except csv.Error as error:
        place = f"{where}, line {reader.reader.line_num}"
        raise InputError(f"{place} is not well-formed CSV: {brief(error)}") from error


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:  # a failure of the system, not of the content
            raise
        raise InputError(f"{path} is not a Parquet file: {brief(error)}") from error


def _read_parquet(path: Path, columns: Columns | None, chosen: np.ndarray | None) -> Iterator[Row]:
    import pyarrow

    with _parquet(path) as file:
        names = file.schema_arrow.names
        if twice := [name for name in names if names.count(name) > 1]:
            raise InputError(f"{path} has two columns {shown(twice[0])}: rename one")
        wanted = None if columns is None else list(columns(names))
        start = 0
        for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
            if chosen is not None:
                first, last = np.searchsorted(chosen, [start, start + len(batch)])
                places, start = chosen[first:last] - start, start + len(batch)
                batch = batch.take(pyarrow.array(places))
            with warnings.catch_warnings(action="error"):  # a value that would lose digits
                values = [list(map(_cell, column)) for column in batch.columns]
            for row in zip(*values, strict=True):
                yield dict(zip(batch.schema.names, row, strict=True))


def _cell(scalar: Any) -> Any:
    """Return the value of a cell, as text if Python has no type for it, such as nanoseconds."""
    import pyarrow

    try:
        return scalar.as_py()
    except Exception:  # each type raises a different one
        if isinstance(scalar, pyarrow.StructScalar):
            return {name: _cell(inner) for name, inner in scalar.items()}
        if isinstance(scalar, pyarrow.ListScalar):
            return list(map(_cell, scalar.values))
        try:
            return scalar.cast(pyarrow.string()).as_py()
        except pyarrow.ArrowException:
            return f"<{scalar.type}>"


def _json_fault(error: Exception, where: str, passed: int = 0) -> InputError:
    """Describe what is wrong with a text that starts at character `passed` of the file."""
    if isinstance(error, json.JSONDecodeError):
        place = f"{error.msg} at character {passed + error.pos}"
        return InputError(f"{where} is not JSON: {place}")
    # numbers with thousands of digits, deep nesting
    return InputError(f"{where} cannot be read as JSON: {brief(error)}")


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise InputError(f'{where} is no object: each row is one, such as {{"text": "…"}}')
    return value


_DECODER = json.JSONDecoder()
_READERS: dict[str, Callable[[TextIO, str], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".txt": _read_txt,
}
