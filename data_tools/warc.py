"""Texts of web pages from WARC files: the main text of HTML responses, and the plain text of WET files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_tools.records import BadRecordError
from megatron_m3.errors import DataError

HTML = ("text/html", "application/xhtml+xml")


def read_warc(path: Path) -> Iterator[tuple[int, Any, int]]:
    """Number of each record, its URL and text (or why it is bad), and its place in the file in bytes."""
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    wanted = WarcRecordType.response | WarcRecordType.conversion
    with path.open("rb") as stream:
        number = 0
        try:
            for number, record in enumerate(ArchiveIterator(stream, record_types=wanted, parse_http=True), 1):
                try:
                    found: Any = {"id": record.headers.get("WARC-Target-URI"), "text": _text(record)}
                except BadRecordError as error:
                    found = error
                yield number, found, stream.tell()
        except OSError as error:
            if error.errno is not None:
                raise
            raise DataError(f"{path}: damaged after record {number} ({error}); get it again") from None
        if not number and path.stat().st_size:
            raise DataError(f"{path}: no WARC response or conversion record in it")


def _text(record: Any) -> str:
    from fastwarc.warc import WarcRecordType
    from resiliparse.extract.html2text import extract_plain_text
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding

    length = record.content_length
    body: bytes = record.reader.read()
    if len(body) < length:
        raise BadRecordError("cut short")
    if record.record_type == WarcRecordType.conversion:
        try:
            return body.decode()
        except UnicodeDecodeError:
            raise BadRecordError("not UTF-8") from None
    if record.http_headers is None or record.http_headers.status_code != 200:
        raise BadRecordError("HTTP status is not 200")
    if record.http_content_type not in HTML:
        raise BadRecordError("not an HTML page")
    page = bytes_to_str(body, str(record.http_charset or detect_encoding(body)))
    return str(extract_plain_text(page, main_content=True, alt_texts=False))
