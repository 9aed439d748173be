"""RFC 4180, byte by byte: what a CSV file holds, as an oracle for whoever reads it fast."""

from __future__ import annotations


def read_records(content: bytes) -> tuple[list[list[bytes]], bool]:
    """Return the records, empty lines before the header left out, and whether a quote is open.

    Quotes that do not begin a value are part of it; so is what follows a closing quote.
    """
    content = content.removeprefix(b"\xef\xbb\xbf")
    records, fields, value = [], [], bytearray()
    is_quoted, is_new, at = False, True, 0
    while at < len(content):
        byte = content[at : at + 1]
        at += 1
        if is_quoted:
            if byte != b'"':
                value += byte
            elif content[at : at + 1] == b'"':
                value += byte
                at += 1
            else:
                is_quoted = False
            continue
        if byte == b'"' and is_new:
            is_quoted, is_new = True, False
        elif byte in (b",", b"\n"):
            fields.append(bytes(value).removesuffix(b"\r"))
            value.clear()
            is_new = True
            if byte == b"\n":
                if records or fields != [b""]:
                    records.append(fields)
                fields = []
        else:
            value += byte
            is_new = False
    if fields or not is_new:
        records.append([*fields, bytes(value).removesuffix(b"\r")])
    return records, is_quoted
