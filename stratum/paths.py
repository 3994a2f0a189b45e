"""From a key to the path a mount shows it under, and back: `stratum path`. Paths are relative to the mount's root.

What exists is translated as it is shown now; what does not exist, as it would be if nothing were in its way.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stratum import buckets, mount_names, tree
from stratum.errors import InvalidArgument, NoSuchBucket, NotFound
from stratum.schema import ROOT_INODE

if TYPE_CHECKING:
    from stratum.transaction import InodeReader


def components(path: bytes) -> list[bytes]:
    """Of a path below the mount's root, at least one. Raises `InvalidArgument`."""
    parts = [part for part in path.split(b"/") if part]
    if not parts or any(part in {b".", b".."} for part in parts):
        raise InvalidArgument("a path here is BUCKET/..., below the mount's root, without '.' and '..'")
    return parts


def to_path(reader: InodeReader, bucket: str, key: bytes) -> bytes:
    """Raises `NoSuchBucket`, or what `tree.check_key` raises."""
    tree.check_key(key)
    directory: int | None = buckets.get(reader, bucket).inode
    entries, name = tree.split_key(key)
    parts = [bucket.encode()]
    for entry in [*entries, *([name] if name else [])]:
        dentry = tree.get_dentry(reader, directory, entry) if directory is not None else None
        if directory is not None and dentry is not None:
            parts.append(mount_names.shown_name(reader, directory, entry))
        else:
            parts.append(_would_be(reader, directory, entry))
        directory = dentry.inode if dentry is not None else None
    path = b"/".join(parts)
    if name:
        return path
    return path + b"/" + (mount_names.BODY if directory is not None and mount_names.body_of(reader, directory) else b"")


def _would_be(reader: InodeReader, directory: int | None, entry: bytes) -> bytes:
    plain = entry.removesuffix(b"/")
    taken = directory is not None and plain == entry and tree.get_dentry(reader, directory, entry + b"/") is not None
    return plain if mount_names.is_plain(plain) and not taken else mount_names.alias(entry)


def to_key(reader: InodeReader, path: bytes) -> tuple[str, bytes]:
    """(bucket, key); the key is empty for a bucket itself, and ends in "/" for a directory.

    Raises `NoSuchBucket`, `NotFound` for an alias of nothing, `InvalidArgument` for a path outside.
    """
    parts = components(path)
    bucket = parts[0].decode("utf-8", "replace")
    if mount_names.find(reader, ROOT_INODE, parts[0]) is None:
        raise NoSuchBucket(bucket)
    directory: int | None = buckets.get(reader, bucket).inode
    key = b""
    for at, part in enumerate(parts[1:], 1):
        last = at == len(parts) - 1
        if part == mount_names.BODY and last and directory is not None and mount_names.body_of(reader, directory):
            return bucket, key
        found = mount_names.find(reader, directory, part) if directory is not None else None
        if found is None and mount_names.looks_like_alias(part):
            raise NotFound(
                f"{part.decode('utf-8', 'replace')!r} is no name of anything; see Semantics on keys a path cannot hold"
            )
        entry = found[0] if found is not None else part + (b"" if last and not path.endswith(b"/") else b"/")
        key += entry
        directory = found[1].inode if found is not None else None
    return bucket, key
