"""The S3 side of a file as extended attributes, read and written where S3 would allow it.

    user.s3.etag             read only, without quotes
    user.s3.storage-class    read only
    user.s3.content-type     and cache-control, content-disposition, content-encoding, content-language, expires
    user.s3.meta.NAME        user metadata; NAME is lower case, as S3 hands it back
    user.s3.tag.KEY          a tag; KEY and value are UTF-8

What is too long for the name of an attribute is not shown.

Only what can be written is listed, so that a copy with attributes (`cp -a`, `rsync -X`) carries what an object can keep and
does not trip over the rest. Values but of tags are bytes of a header, one character each.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

from stratum import hints, objects, storage_classes, tags
from stratum.errors import InvalidArgument, InvalidTag, NoSpace, NoSuchAttribute, NotPermitted
from stratum.schema import Kind, ObjectMetadata

if TYPE_CHECKING:
    from stratum.schema import Inode
    from stratum.transaction import InodeReader, MetadataTransaction

PREFIX = b"user.s3."
STORED_HEADERS = ("cache-control", "content-disposition", "content-encoding", "content-language", "expires")
USER_METADATA_BYTES_MAX = 2048
_META = "meta."
_TAG = PREFIX + b"tag."
_NAME_BYTES_MAX = 255
_READ_ONLY = frozenset(("etag", "storage-class"))
_NAME = re.compile(r"[a-z0-9!#$%&'*+.^_`|~-]+")
_VALUE = re.compile(r"[\x20-\x7e\x80-\xff\t]*")


def is_one(name: bytes) -> bool:
    return name.startswith(PREFIX)


def get(reader: InodeReader, number: int, name: bytes) -> bytes:
    """Raises `NoSuchAttribute`."""
    inode = reader.inode(number)
    if name.startswith(_TAG):
        return _tag(objects.metadata_of(reader, inode), name)
    what = name[len(PREFIX) :].decode("latin-1")
    found = None
    if inode.kind == Kind.FILE:
        metadata = objects.metadata_of(reader, inode)
        if what == "etag":
            found = inode.etag_text
        elif what == "storage-class":
            found = storage_classes.of(reader, inode, metadata)
        elif what == "content-type":
            found = metadata.content_type or None
        elif what.startswith(_META):
            found = metadata.user.get(what[len(_META) :])
        else:
            found = metadata.headers.get(what)
    if found is None:
        raise NoSuchAttribute(f"the file has no {what!r} for S3")
    return found.encode("latin-1")


def names(reader: InodeReader, inode: Inode) -> list[bytes]:
    """Those that are set and can be written."""
    if inode.kind != Kind.FILE or not inode.has_metadata:
        return []
    metadata = objects.metadata_of(reader, inode)
    found = ["content-type"] if metadata.content_type else []
    found += [*metadata.headers, *(_META + name for name in metadata.user)]
    shown = [PREFIX + name.encode("latin-1") for name in found] + [_TAG + key.encode() for key in metadata.tags]
    return [name for name in shown if len(name) <= _NAME_BYTES_MAX]


def _tag(metadata: ObjectMetadata, name: bytes) -> bytes:
    value = metadata.tags.get(name[len(_TAG) :].decode("utf-8", "replace"))
    if value is None:
        raise NoSuchAttribute(f"the file has no tag {name[len(_TAG) :].decode('utf-8', 'replace')!r}")
    return value.encode()


def set_value(tx: MetadataTransaction, number: int, name: bytes, value: bytes) -> None:
    """Raises `InvalidArgument`, `NotPermitted`, or `NoSpace` when S3 would not take that much user metadata."""
    if name.startswith(_TAG):
        _set_tag(tx, number, name, value)
        return
    text = value.decode("latin-1")
    if not _VALUE.fullmatch(text):
        raise InvalidArgument(f"{name.decode('latin-1')!r}: a header of S3 has no control characters")
    _change(tx, number, name, text)


def remove(tx: MetadataTransaction, number: int, name: bytes) -> None:
    """Raises `NoSuchAttribute` or `NotPermitted`."""
    get(tx, number, name)
    if name.startswith(_TAG):
        _set_tag(tx, number, name, None)
    else:
        _change(tx, number, name, None)


def _set_tag(tx: MetadataTransaction, number: int, name: bytes, value: bytes | None) -> None:
    inode = tx.inode(number)
    if inode.kind != Kind.FILE:
        raise NotPermitted(f"inode {number} is no file; S3 keeps tags of objects only")
    try:
        key, text = name[len(_TAG) :].decode(), None if value is None else value.decode()
    except UnicodeDecodeError as error:
        raise InvalidTag("a tag is UTF-8") from error
    metadata = objects.metadata_of(tx, inode)
    found = _with(metadata.tags, key, text)
    if text is not None:
        tags.check(key, text)
        if len(found) > tags.OBJECT_TAGS_MAX:
            raise NoSpace(f"an object has at most {tags.OBJECT_TAGS_MAX} tags; remove one")
    _put(tx, inode, replace(metadata, tags=found))


def _put(tx: MetadataTransaction, inode: Inode, changed: ObjectMetadata) -> None:
    objects.set_metadata(tx, inode, changed)
    inode.ctime_ns = tx.now_ns
    tx.changed(0, b"", inode.number)


def _change(tx: MetadataTransaction, number: int, name: bytes, value: str | None) -> None:
    what = name[len(PREFIX) :].decode("latin-1")
    inode = tx.inode(number)
    if inode.kind != Kind.FILE or what in _READ_ONLY:
        raise NotPermitted(f"{what!r} of inode {number} is not for writing; S3 derives it")
    metadata = objects.metadata_of(tx, inode)
    if what == "content-type":
        changed = replace(metadata, content_type=value or "")
    elif what.startswith(_META):
        if value is not None:
            hints.check(_user_name(what), value)
        changed = replace(metadata, user=_with(metadata.user, _user_name(what), value))
        if sum(len(key) + len(text) for key, text in changed.user.items()) > USER_METADATA_BYTES_MAX:
            raise NoSpace(f"the user metadata of an object has at most {USER_METADATA_BYTES_MAX} bytes; remove some")
    elif what in STORED_HEADERS:
        changed = replace(metadata, headers=_with(metadata.headers, what, value))
    else:
        raise NotPermitted(f"S3 keeps no {what!r}; user metadata is user.s3.meta.NAME")
    _put(tx, inode, changed)


def _user_name(what: str) -> str:
    name = what[len(_META) :]
    if not _NAME.fullmatch(name):
        raise InvalidArgument(f"{name!r} is not a name of user metadata: lower-case letters, digits and -_.")
    return name


def _with(values: dict[str, str], name: str, value: str | None) -> dict[str, str]:
    rest = {key: text for key, text in values.items() if key != name}
    return rest if value is None else {**rest, name: value}
