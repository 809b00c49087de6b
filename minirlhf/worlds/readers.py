"""Files to rows: text, JSON, CSV and parquet, gzipped or not; held are a row and a buffer.

A row is a dict keyed by what its columns mean (readers.toml); what becomes of rows is in
examples.py. Under None stands why a row is none. What a file is follows from its name, and where
that says nothing, from how it begins.
"""

import codecs
import csv
import functools
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from minirlhf.disk import cannot_read, check_regular, parse_object, read_toml, shorten
from minirlhf.errors import InputError

_TABLES = read_toml(Path(__file__).with_suffix(".toml"))
COLUMNS, FORMS = _TABLES["columns"], _TABLES["forms"]
LONGEST = 1 << 24  # characters of a line, which is parted, or of an entry of an array
_LINES = 50_000  # of a document, which is parted
_HEAD = 2000  # lines from which it is guessed whether blank lines part documents
_CHUNK = 1 << 16
_NO_TEXT = re.compile("[\0\ud800-\udfff]")  # bytes that are not UTF-8 come as half surrogates
_JSON = re.compile(r"\{\s*[\"'}]|\[\s*\{")  # how JSON begins, and hardly ever a text
_BETWEEN = re.compile(r"[\s,]*")  # what stands between the entries of an array
_BEFORE = re.compile(  # of rows that are not one a line: a bracket, an object up to there, nothing
    r'\s*(?:\[|\{(?:\s*"\w+"\s*:\s*(?:"[^"]*"|[\w.+-]+)\s*,)*'
    r'\s*"(?:data|rows|examples|train|instances)"\s*:\s*\[(?=\s*\{)|(?=\{\s*\n))'
)
_BROKEN = 10  # lines that are no JSON may be skipped, or one in a hundred

Named = tuple[tuple[str, str], ...]  # what a column means, its name in small letters
Rows = Iterator[tuple[int, dict[str | None, Any]]]


def name_and_kind(path: str | Path) -> tuple[str, str]:
    """("plays", "json") of plays.JSONL.gz; the kind of an unknown ending is text."""
    path = Path(path)
    path = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.stem, _TABLES["kinds"].get(path.suffix.lower(), "text")


def rows_of(
    path: str | Path, source: str, *, unit: str, named: Named, found: set[str], notes: list[str]
) -> Rows:
    """(line, row) of every row that is not blank; of parquet, the row's number.

    Args:     source: the option that names the file: "corpus" or "pairs".
              named: each counts if the file has it, and is `found`; else the usual names do.
              notes: gets a sentence if it was guessed what a row is.
    """
    kind = name_and_kind(path)[1]
    means = functools.partial(_meanings, source=source, named=named, found=found)
    try:
        check_regular(path)
        with open(path, "rb") as raw:
            file = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            head = file.peek(_CHUNK)
            wide = head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
            encoding = "utf-16" if wide else "utf-8-sig"
            start = head.decode(encoding, errors="ignore").replace("\r\n", "\n")
            if kind == "text":
                kind = _kind_by_content(head, start.lstrip(), named)
            if kind != "text" and unit != "auto" and source == "corpus":
                notes.append(f"--corpus-unit changes nothing for {path}, which has rows")
            if kind == "parquet":
                yield from _parquet_rows(file, path, means)
                return
            text = io.TextIOWrapper(file, encoding, errors="surrogateescape")
            if kind == "json":
                before = _BEFORE.match(start)
                if before and not _known(tuple(re.findall(r'"(\w+)"\s*:', before[0])), named):
                    entries = _array(text, path, before[0], notes)
                else:
                    entries = (line for line in _lines(text, path) if line[1].strip())
                yield from _json_rows(entries, path, means)
            elif kind == "csv":
                yield from _csv_rows(text, path, means)
            elif source == "corpus":
                yield from _text_rows(text, path, unit, notes)
            elif start.strip():
                raise InputError(
                    f"{path}: expected preferences as JSON, CSV or parquet; got the text "
                    f"{shorten(start)!r}: give plain text as --corpus"
                )
    except OSError as error:
        raise cannot_read(path, error) from error
    except (EOFError, zlib.error, UnicodeError) as error:
        raise _damaged(path, "a whole file", error) from error


def _damaged(where: str | Path, expected: str, error: Exception) -> InputError:
    came = shorten(str(error), 120)
    return InputError(f"{where}: expected {expected}; got {came}: correct or restore it")


def _kind_by_content(head: bytes, start: str, named: tuple) -> str:
    if head.startswith(b"PAR1"):
        return "parquet"
    if _JSON.match(start):
        return "json"
    line = start.partition("\n")[0]
    names = tuple(name.strip('" \r').lower() for name in line.split(_delimiter(line)))
    here = tuple(pair for pair in named if pair[1] in names)
    return "csv" if len(names) > 1 and _sources(_known(names, here)) else "text"


# --- what the columns mean
def named_columns(columns: tuple[str, ...]) -> Named:
    """(meaning, name) of each "meaning=name"; a meaning may be any name that it is known by."""
    known = {name: meaning for meaning, names in COLUMNS.items() for name in (*names, meaning)}
    split = (column.partition("=") for column in columns)
    named = tuple((known.get(m, m), name.strip().lower()) for m, _, name in split)
    if any(m not in COLUMNS or not name or _NO_TEXT.search(name) for m, name in named):
        raise InputError(
            f"--columns: expected MEANING=NAME, each meaning one of {', '.join(COLUMNS)}; got "
            f"{shorten(' '.join(columns))!r}: write, for example, prompt=title"
        )
    return named


@functools.lru_cache(maxsize=64)
def _known(names: tuple[str, ...], named: Named) -> dict[str, str]:
    """meaning -> name of the columns that are known."""
    there = {name.strip().lower(): name for name in names}
    called = COLUMNS | {meaning: (name,) for meaning, name in named}
    found = {meaning: [o for o in options if o in there] for meaning, options in called.items()}
    known = {meaning: there[options[0]] for meaning, options in found.items() if options}
    if "input" in known and known["input"] == known.setdefault("prompt", known["input"]):
        del known["input"]
    return known


def _sources(known: dict[str, str]) -> list[str]:
    """The options that could name a file with these columns."""
    return [s for s, forms in FORMS.items() if any(known.keys() >= {*form} for form in forms)]


def _meanings(names, where: str, *, source: str, named: Named, found: set[str]) -> dict[str, str]:
    """`_known`, refused where it is not what the source needs."""
    there = {name.strip().lower() for name in names}
    found.update(name for _, name in named if name in there)
    known = _known(tuple(names), tuple(pair for pair in named if pair[1] in found))
    sources = _sources(known)
    if source in sources:
        return known
    came = shorten(", ".join(names), 120) or "none"
    forms = ", or ".join(" and ".join(form) for form in FORMS[source])
    example = " ".join(f"{meaning}=NAME" for meaning in FORMS[source][0])
    advice = f"give the file as --{sources[0]}" if sources else f"name yours: --columns {example}"
    if missing := [name for _, name in named if name not in there]:
        advice = f"correct {shorten(missing[0])!r} in --columns, it has no such column"
    raise InputError(f"{where}: expected the columns {forms}; got {came}: {advice}")


# --- the kinds of files
def _lines(text: TextIO, path: str | Path) -> Iterator[tuple[int, str]]:
    """(number, line), its end included."""
    for number, line in enumerate(iter(lambda: text.readline(LONGEST), ""), 1):
        _refuse_bytes(line, path, number)
        yield number, line


def _refuse_bytes(text: str, path: str | Path, line: int) -> None:
    if wrong := _NO_TEXT.search(text):
        number = line + text.count("\n", 0, wrong.start())
        came = f"the byte {ord(wrong.group()) & 0xFF:#04x} in line {number}: save the file as UTF-8"
        if text.startswith("PK\3\4"):
            came = "a ZIP archive, as .xlsx and .docx are: unpack it, or export the table as .csv"
        raise InputError(f"{path}: expected UTF-8 text; got {came}")


def _text_rows(text: TextIO, path: str | Path, unit: str, notes: list[str]) -> Rows:
    """The lines of a plain text, or its documents between blank lines, of _LINES at most."""
    lines = _lines(text, path)
    head = list(islice(lines, _HEAD))
    shape = "".join("x" if line.strip() else " " for _, line in head)
    gaps = len(shape.split()) - 1
    if unit == "auto" and gaps > 0:
        unit = "document" if gaps >= max(2, 0.01 * shape.count("x")) else "line"
        other = "document" if unit == "line" else "line"
        notes.append(f"{path}: each {unit} is an example; with --corpus-unit {other} each {other}")
    most = _LINES if unit == "document" else 1
    for is_text, group in groupby(chain(head, lines), key=lambda line: bool(line[1].strip())):
        while is_text and (part := list(islice(group, most))):
            yield part[0][0], {"text": "\n".join(line.rstrip() for _, line in part).strip()}


def _json_rows(entries: Iterator[tuple[int, Any]], path: str | Path, means: Callable) -> Rows:
    """The objects of an array, or one a line; a few that are broken are left out."""
    known, broken = {}, []
    for number, entry in entries:
        where = f"{path}:{number}"
        try:
            entry = parse_object(entry, where) if isinstance(entry, str) else entry
        except InputError as error:
            broken.append(error)
            if len(broken) > max(_BROKEN, number // 100):
                raise broken[0] from None
            yield number, {None: "broken"}
            continue
        try:
            known = means(entry, where)
            row = {meaning: entry[name] for meaning, name in known.items()}
        except InputError:
            if not known:  # it is not this row, it is the file
                raise
            row = {None: "with other columns"}
        yield number, row
    if broken and not known:
        raise broken[0]


def _array(text: TextIO, path: str | Path, before: str, notes: list[str]) -> Iterator[tuple]:
    """(line, row, or the text of what is none) of an array; held is what is not parsed yet."""
    decoder, buffer = json.JSONDecoder(), ""
    line = 1 + text.read(len(before)).count("\n")
    while len(buffer) < LONGEST and (chunk := text.read(max(_CHUNK, len(buffer)))):
        _refuse_bytes(chunk, path, line + buffer.count("\n"))
        buffer, at = buffer + chunk, 0
        while True:
            start = _BETWEEN.match(buffer, at).end()
            try:
                entry, end = decoder.raw_decode(buffer, start)
            except (ValueError, RecursionError):
                break  # it goes on in the next chunk, or is wrong
            line += buffer.count("\n", at, start)
            yield line, entry if isinstance(entry, dict) else buffer[start:end]
            line, at = line + buffer.count("\n", start, end), end
        buffer = buffer[at:]
    start = _BETWEEN.match(buffer).end()
    try:
        whole = json.loads(before + (rest := buffer[start:]) or "[]")  # but for the rows
    except (ValueError, RecursionError) as error:
        came = repr(shorten(rest.removeprefix("]"))) if rest else "the end of the file"
        raise InputError(
            f"{path}:{line + buffer.count(chr(10), 0, start)}: expected JSON objects up to the end "
            f"of one list; got {came}: correct or restore it"
        ) from error
    if others := [key for key in whole if whole[key] and isinstance(whole[key], list)]:
        notes.append(f"{path}: of its lists only one is read, not {shorten(', '.join(others))}")


def _delimiter(header: str) -> str:
    return max(",;\t|", key=header.count)


def _csv_rows(text: TextIO, path: str | Path, means: Callable) -> Rows:
    """Rows below a line of names; a row with more fields than names is one of others."""
    csv.field_size_limit(LONGEST)
    lines = _lines(text, path)
    start, header = next(((n, line) for n, line in lines if line.strip()), (1, ""))
    stream = chain([header], (line for _, line in lines))
    reader = csv.reader(stream, delimiter=_delimiter(header), skipinitialspace=True, strict=True)
    try:
        names = next(reader, [])
        known = means(names, f"{path}:{start}") if names else {}
        number = start + reader.line_num
        for fields in reader:
            row = dict(zip_longest(names, fields))
            if None in row:
                yield number, {None: "with other columns"}
            elif fields:
                yield number, {meaning: row[name] for meaning, name in known.items()}
            number = start + reader.line_num
    except csv.Error as error:
        raise _damaged(f"{path}:{start + reader.line_num - 1}", "CSV", error) from error


def _parquet_rows(file: BinaryIO, path: str | Path, means: Callable) -> Rows:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise InputError(
            f"{path}: expected the package pyarrow, which reads parquet; it is not installed: pip "
            "install pyarrow, or save the file as .jsonl"
        ) from error
    if isinstance(file, gzip.GzipFile):  # in which nobody can go to the end and back
        file = io.BytesIO(file.read())
    try:
        table = parquet.ParquetFile(file)
        known = means(table.schema_arrow.names, str(path))
        batches = table.iter_batches(batch_size=256, columns=list(known.values()))
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
            yield number, {meaning: row[name] for meaning, name in known.items()}
    except (ArrowException, OSError) as error:
        raise _damaged(path, "parquet", error) from error
