"""S3's XML: requests through a parser without DTDs and entities, answers as escaped text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING
from xml.etree.ElementTree import Element, ParseError
from xml.sax.saxutils import escape as _escape

import defusedxml.ElementTree
from defusedxml.common import DefusedXmlException

from stratum.s3.errors import S3Error
from stratum.s3.wording import worded

if TYPE_CHECKING:
    from collections.abc import Iterable

NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"
HEADER = '<?xml version="1.0" encoding="UTF-8"?>\n'
_DEPTH_MAX = 8
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff]")


def parse(body: bytes, root: str) -> Element:
    """The document's root element, namespaces stripped. Raises `S3Error` MalformedXML."""
    try:
        tree = defusedxml.ElementTree.fromstring(body, forbid_dtd=True)
    except (ParseError, DefusedXmlException, ValueError, LookupError) as error:
        raise S3Error("MalformedXML", "the body is not well-formed XML, or has a document type") from error
    assert tree is not None
    _strip(tree, 0)
    if tree.tag != root:
        raise S3Error("MalformedXML", f"the body is a {tree.tag!r}, not a {root!r}")
    return tree


def _strip(element: Element, depth: int) -> None:
    if depth > _DEPTH_MAX:
        raise S3Error("MalformedXML", "the body is nested too deeply")
    element.tag = element.tag.rpartition("}")[2]
    for child in element:
        _strip(child, depth + 1)


def only(element: Element, allowed: Iterable[str]) -> None:
    """Raises `S3Error` MalformedXML if `element` has a child that is not allowed, or one twice."""
    seen: set[str] = set()
    for child in element:
        if child.tag not in allowed:
            raise S3Error("MalformedXML", f"{element.tag} has an unknown element {child.tag!r}")
        if child.tag in seen:
            raise S3Error("MalformedXML", f"{element.tag} has {child.tag!r} twice")
        seen.add(child.tag)


def text(element: Element, name: str) -> str | None:
    """Text of a child without surrounding space; None if the child is missing."""
    child = element.find(name)
    return None if child is None else (child.text or "").strip()


def verbatim(element: Element, name: str) -> str | None:
    """Text of a child with its surrounding space: a prefix of one space is not the empty one."""
    child = element.find(name)
    return None if child is None else child.text or ""


def escape(value: str) -> str:
    """Text for an element. What XML 1.0 cannot carry becomes a character reference, as S3 sends it."""
    escaped = _escape(value, {"\r": "&#13;", '"': "&quot;"})
    return _CONTROL.sub(lambda match: f"&#x{ord(match.group()):x};", escaped) if _CONTROL.search(escaped) else escaped


def element(name: str, value: str | int | bool | None) -> str:
    if value is None:
        return ""
    plain = str(value).lower() if isinstance(value, bool) else str(value)
    return f"<{name}>{escape(plain)}</{name}>"


def document(root: str, *parts: str) -> bytes:
    return f'{HEADER}<{root} xmlns="{NAMESPACE}">{"".join(parts)}</{root}>'.encode()


def error(
    code: str, message: str, resource: str, request_id: str, extra: dict[str, str], host_id: str | None = None
) -> bytes:
    fields = "".join(element(name, value) for name, value in extra.items())
    message = worded(code, message)
    return (
        f"{HEADER}<Error>{element('Code', code)}{element('Message', message)}{fields}{element('Resource', resource)}"
        f"{element('RequestId', request_id)}{element('HostId', host_id)}</Error>"
    ).encode()
