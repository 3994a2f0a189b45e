"""The rows of a volume: this module is the reference for what lies in the metadata store.

Integers in keys are big-endian so that byte order is number order. Every key begins with one table letter.

    A access_key                 -> JSON {user, secret (sealed), created_ns}
    B bucket name                -> JSON BucketRow; the bucket's directory is also a dentry of the root
    C name                       -> 8-byte counter: "session" (ids given out), "format"
    D node, entry                -> Dentry; see below
    E extent                     -> 16-byte checksum, then the bytes of an extent that lies in no data file yet
    F txn, extent                -> generation of the extent, which had no references then; its X row, K row and bytes go when no reader
                                    is older than txn, if it still has that generation
    G segment                    -> SegmentRow: one data file
    H bucket inode               -> JSON {objects, bytes, inodes}: what the bucket holds. Instead of `inodes`, `since`: how many more there are since something
                                    began to count them (inode_counts.py)
    I inode                      -> Inode
    K extent                     -> block checksums, 16 bytes a block, if they do not fit the X row
    L txn, number                -> ChangeRow: what mounts must forget; written only while a mount lives
    M inode                      -> JSON S3 metadata of a file (headers, user metadata, checksums, owner, ACL)
    N inode                      -> the whole content of a small file: 16-byte checksum, then the bytes
    O session, inode             -> empty: the mount of that session still uses an inode without a name
    P upload, part number        -> JSON PartRow: an uploaded part; its inode has no name
    Q session, inode             -> empty: a tree without a name that the session builds or removes
    R user id                    -> JSON UserRow
    S inode, file offset         -> Slice: bytes of a file that lie in an extent. A hole has no row
    T session                    -> JSON: a live mount {socket, device, mountpoint, slot, read_only, bucket, shared, locks, asked, renews, refused, still}
    U bucket inode, key NUL upload id -> JSON UploadRow (long strings are split, see longkeys)
    V bucket inode, key NUL inverted counter -> reserved for noncurrent versions and delete markers
    W inode                      -> empty: an inode whose many slices are being freed in small transactions
    X extent                     -> ExtentRow, then its checksums if they are few
    Y inode, name                -> an extended attribute
    Z session                    -> JSON {role, pid, started_ns, slot, kept, fenced}: a process that has the volume open, or will

Tables of clones that are still being filled (frozen.py).

    e freeze, key                -> 0x01 and the row of that key when the freeze began; 0x00: there was none
    k inode                      -> freeze, inode, entry: a directory that waits for the entries behind this one of a frozen directory
    w freeze                     -> the clone's bucket inode, the directory that is cloned, how many directories wait for it
    x freeze, inode              -> inode: the copy of a file that has several names in the frozen tree
    y inode, entry               -> empty: an entry that came before its turn (long ones are split, see longkeys)

Tables of the tiers. A *pack* is an immutable container of whole extents, the unit that lies in the warm or the cold tier.

    a inode                      -> AccessRow: evidence about a file with extents
    b tier, last access s, inode -> empty: files by the hottest tier they have bytes in, longest unused first
    c extent, tier               -> CopyRow: a verified copy of the extent in a pack
    d disk                       -> JSON DiskRow: a folder of the warm tier
    f inode                      -> empty: a file that may lie in many pieces (not of the tiers; see compaction)
    g name                       -> JSON: settings and cursors: of the tiers, of health, of the last backup, of the audit log; `gfrozen` counts freezes; `gbuckets` differs when a B row does (inventory.py)
    h pack                       -> JSON {why}: a pack whose shards want repair
    i inode, digest of the rest  -> directory, entry: a name of an inode that has several (not of the tiers; see names.py)
    j inode, time ns             -> JSON: a decision or move, for `stratum explain`
    l segment, offset            -> 8-byte length: hot bytes of an extent that has left; they are given back, then the row goes
    m inode                      -> JSON MoveRow: a move that somebody asked for
    n name                       -> JSON ColdRow: a remote of the cold tier
    o extent, inode              -> empty: the file has, or had, a slice of the extent
    p pack                       -> JSON PackRow
    q pack, extent               -> CopyRow with the pack's number: what a pack holds
    r due s, pack                -> empty: a condemned pack whose bytes go when due
    s bucket inode               -> JSON: the bucket's lifecycle rules
    t inode                      -> JSON RestoreRow: a temporary copy asked for by RestoreObject
    u bucket inode               -> JSON {bytes, objects}: the bucket's quota
    v user id                    -> JSON {bytes, objects}: the quota over all buckets of a user
    z kind, number               -> JSON DamageRow: damage that was found and is not healed (damage.py); kind is x extent, p pack or n inode

Dentries. The entry of a file is its name, the entry of a directory its name and "/". So the rows under one
directory stand in the order of S3 keys, and `a` and `a/` stand beside each other. S3 keys are split after every
"/", nothing else; the empty component, "." and ".." are ordinary entries.
The inode of a directory knows the object whose key is the directory's own (`d/`), if S3 put one, and whether the
directory is explicit: made by mkdir, or kept because the mount removed its last child. An explicit directory
without live children *is* the key `d/`, empty.

Inodes. Numbers are session id << 32 | counter, never used twice; 1 is the root. For a directory `entries` counts all
dentries and `live` those that S3 shows (files, and directories that are or contain keys). A directory that is not
explicit, has no object and no entries does not exist. `parent` is the directory of a directory, and of another inode the one
that its newest name stands in; `entry` is that name (names.py), and stands behind the rest of the row. A file's `entries` are its allocated bytes and one, and its highest bit says that it is partly cold. `version` grows with every committed
change of content.
"""

from __future__ import annotations

import enum
import json
import struct
from dataclasses import asdict, dataclass, field
from typing import Any

from stratum.kv.contract import prefix_end

ROOT_INODE = 1
LINKS_MAX = 65000
FORMAT_VERSION = 5
"""1: until 0.1. 2: quotas, limits and the audit log, which a program of format 1 would pass over; buckets say whether reads are audited.
3: the store has a journal, without which it may not be whole. 4: inodes tell their names. 5: directories of clones may wait for
what they hold, and changed rows be kept for them."""
NAMES_FORMAT = 4
UPGRADING = 1 << 32
"""Added to the format that an unfinished upgrade leads to: no program opens such a volume."""
ETAG_PARTS_VERSIONED = 0xFFFF
"""`etag_parts` of a file whose content did not come whole through S3."""

_U64 = struct.Struct(">Q")
_U64U64 = struct.Struct(">QQ")
pack_u64 = _U64.pack
unpack_u64 = _U64.unpack


def key_u64(table: bytes, number: int) -> bytes:
    return table + pack_u64(number)


def key_u64_u64(table: bytes, first: int, second: int) -> bytes:
    return table + _U64U64.pack(first, second)


def split_u64_u64(key: bytes) -> tuple[int, int]:
    first, second = _U64U64.unpack_from(key, 1)
    return first, second


class Kind(enum.IntEnum):
    """What an inode is. The value is stored."""

    FILE = 1
    DIRECTORY = 2
    SYMLINK = 3
    FIFO = 4
    SOCKET = 5
    CHARACTER_DEVICE = 6
    BLOCK_DEVICE = 7


_DENTRY = struct.Struct(">QB")


class Dentry:
    """What a name leads to. Packed, it has `BYTES` bytes, more than the row of a long name's beginning."""

    __slots__ = ("inode", "kind")
    BYTES = _DENTRY.size

    def __init__(self, inode: int, kind: int) -> None:
        self.inode = inode
        self.kind = kind

    def pack(self) -> bytes:
        return _DENTRY.pack(self.inode, self.kind)

    @classmethod
    def unpack(cls, raw: bytes) -> Dentry:
        return cls(*_DENTRY.unpack(raw))


_PARTLY_COLD = 1 << 63
INODE_STRUCT = struct.Struct(">BBHIIIIQQqqqQ16sQQQQ")


class Inode:
    """A file or directory. Times are ns since 1970, sizes bytes. Mutable: transactions cache and pack it once."""

    __slots__ = (
        "atime_ns", "bucket", "ctime_ns", "entries", "entry", "etag", "etag_parts", "flags", "gid", "kind", "live", "mode", "mtime_ns", "nlink", "number",
        "parent", "rdev", "size", "uid", "version",
    )  # fmt: skip

    INLINE = 1  # the content is in the N table
    HAS_METADATA = 2  # there is an M row
    READ_ONLY = 4  # a bucket's directory: nothing below it changes
    EXPLICIT = 8  # a directory that exists without children
    ACCESS_LIST = 16  # there is a Y row system.posix_acl_access
    DEFAULT_ACCESS_LIST = 32  # a directory with a Y row system.posix_acl_default
    SEVERAL_NAMES = 64  # each has a row of table i

    def __init__(
        self,
        number: int,
        kind: int,
        *,
        mode: int,
        uid: int,
        gid: int,
        now_ns: int,
        bucket: int,
        parent: int = 0,
        rdev: int = 0,
    ) -> None:
        self.number = number
        self.kind = kind
        self.flags = 0
        self.etag_parts = ETAG_PARTS_VERSIONED
        self.mode = mode
        self.uid = uid
        self.gid = gid
        self.nlink = 1
        self.rdev = rdev
        self.size = 0
        self.atime_ns = self.mtime_ns = self.ctime_ns = now_ns
        self.version = 1
        self.etag = bytes(16)
        self.entries = 1 if kind == Kind.FILE else 0
        self.live = 0
        self.bucket = bucket
        self.parent = parent
        self.entry = b""

    def pack(self) -> bytes:
        return self.pack_attributes() + self.entry

    def pack_attributes(self) -> bytes:
        """All but the name."""
        return INODE_STRUCT.pack(
            self.kind, self.flags, self.etag_parts, self.mode, self.uid, self.gid, self.nlink, self.rdev, self.size,
            self.atime_ns, self.mtime_ns, self.ctime_ns, self.version, self.etag, self.entries, self.live, self.bucket, self.parent,
        )  # fmt: skip

    @classmethod
    def unpack(cls, number: int, raw: bytes) -> Inode:
        self = cls.__new__(cls)
        self.number = number
        (
            self.kind, self.flags, self.etag_parts, self.mode, self.uid, self.gid, self.nlink, self.rdev, self.size,
            self.atime_ns, self.mtime_ns, self.ctime_ns, self.version, self.etag, self.entries, self.live, self.bucket, self.parent,
        ) = INODE_STRUCT.unpack_from(raw)  # fmt: skip
        self.entry = raw[INODE_STRUCT.size :]
        return self

    @property
    def object_inode(self) -> int:
        """Of a directory: the inode of the object whose key is the directory's own, or 0. Kept in `rdev`."""
        return self.rdev if self.kind == Kind.DIRECTORY else 0

    @property
    def allocated(self) -> int | None:
        """Of a file: its bytes that lie in extents or inline, which a hole has not; None if its row comes from a version that did not count them.

        Kept in `entries`, with one added.
        """
        counted = self.entries & ~_PARTLY_COLD
        return counted - 1 if counted else None

    @allocated.setter
    def allocated(self, size: int) -> None:
        self.entries = self.entries & _PARTLY_COLD | size + 1

    @property
    def partly_cold(self) -> bool:
        """Of a file whose hottest bytes are not cold: whether others may lie in the cold tier alone. Kept in `entries`."""
        return self.kind == Kind.FILE and self.entries >= _PARTLY_COLD

    @partly_cold.setter
    def partly_cold(self, value: bool) -> None:
        self.entries = self.entries & ~_PARTLY_COLD | (_PARTLY_COLD if value else 0)

    @property
    def has_metadata(self) -> bool:
        return bool(self.flags & Inode.HAS_METADATA)

    @property
    def explicit(self) -> bool:
        return bool(self.flags & Inode.EXPLICIT)

    @property
    def is_live(self) -> bool:
        """Whether S3 shows this directory or something below it."""
        return self.live > 0 or self.rdev != 0 or bool(self.flags & Inode.EXPLICIT)

    @property
    def etag_text(self) -> str:
        """The ETag without quotes: MD5 hex, `md5-N` after parts, or the version-counter form after mount writes."""
        return etag_text(self.number, self.version, self.etag, self.etag_parts)


def etag_text(number: int, version: int, etag: bytes, parts: int) -> str:
    if parts == 0:
        return etag.hex()
    if parts == ETAG_PARTS_VERSIONED:
        return f"{number:016x}{version:016x}-1"
    return f"{etag.hex()}-{parts}"


LISTED_STRUCT = struct.Struct(">BxH24xQ8xq8xQ16s")
"""Of a packed inode what a listing shows: kind, etag_parts, size, mtime_ns, version, etag."""

_SLICE = struct.Struct(">QQQ")


@dataclass(slots=True, frozen=True)
class Slice:
    """`length` bytes at `file_offset` lie in `extent` from `extent_offset` on."""

    file_offset: int
    length: int
    extent: int
    extent_offset: int

    @property
    def end(self) -> int:
        return self.file_offset + self.length

    def pack(self) -> bytes:
        return _SLICE.pack(self.length, self.extent, self.extent_offset)

    @classmethod
    def unpack(cls, file_offset: int, raw: bytes) -> Slice:
        return cls(file_offset, *_SLICE.unpack(raw))


_EXTENT = struct.Struct(">QQQQQ")
EXTENT_CHECKSUMS_INLINE_BYTES_MAX = 256


@dataclass(slots=True)
class ExtentRow:
    """An immutable run of bytes. `generation` changes whenever its location does."""

    length: int
    segment: int
    offset: int
    references: int
    generation: int = 1

    def pack(self, checksums: bytes) -> bytes:
        inline = checksums if len(checksums) <= EXTENT_CHECKSUMS_INLINE_BYTES_MAX else b""
        return _EXTENT.pack(self.length, self.segment, self.offset, self.references, self.generation) + inline

    @classmethod
    def unpack(cls, raw: bytes) -> tuple[ExtentRow, bytes]:
        """The row and the checksums it carries (empty: they are in the K table)."""
        return cls(*_EXTENT.unpack_from(raw)), raw[_EXTENT.size :]


STORED_SEGMENT = 0
"""The segment of extents whose bytes are an E row."""
ELSEWHERE_SEGMENT = 1
"""The segment of extents that have no hot bytes: their c rows say where they lie. Real numbers begin at 1 << 32."""

_SEGMENT = struct.Struct(">IQQ")


@dataclass(slots=True)
class SegmentRow:
    """A data file on hot path `path`. `extents` counts extents not yet reclaimed, `live_bytes` their bytes."""

    path: int
    extents: int
    live_bytes: int

    def pack(self) -> bytes:
        return _SEGMENT.pack(self.path, self.extents, self.live_bytes)

    @classmethod
    def unpack(cls, raw: bytes) -> SegmentRow:
        return cls(*_SEGMENT.unpack(raw))


_encode = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode
_decode = json.JSONDecoder(parse_constant=lambda _: 0.0).decode
"""NaN and the infinities are no JSON. A row that holds one was written by an older program, and 0 stands for no limit everywhere."""


def pack_json(value: dict[str, Any]) -> bytes:
    """Raises `ValueError` for a number that is none."""
    return _encode(value).encode()


def unpack_json(raw: bytes) -> dict[str, Any]:
    value: dict[str, Any] = _decode(raw.decode())
    return value


@dataclass(slots=True, frozen=True)
class BucketRow:
    """`acl` is a canned ACL; `anonymous` is the operator's switch over the whole bucket.

    `audit_reads`: reads of it are in the audit log, too. `snapshot_of` is the path that a snapshot was taken of; such a bucket does not change, and its directory says so too.
    """

    inode: int
    owner: str
    created_ns: int
    acl: str = "private"
    anonymous: str = "none"
    uid: int = 0
    gid: int = 0
    file_mode: int = 0o644
    dir_mode: int = 0o755
    region: str = ""
    audit_reads: bool = False
    snapshot_of: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def pack(self) -> bytes:
        return pack_json(asdict(self))


@dataclass(slots=True, frozen=True)
class UserRow:
    user_id: str
    name: str
    display_name: str
    email: str
    admin: bool
    created_ns: int

    def pack(self) -> bytes:
        return pack_json(asdict(self))


@dataclass(slots=True, frozen=True)
class ObjectMetadata:
    """What S3 keeps about an object beside its bytes. `checksums` maps an algorithm to its base64 value.

    `storage_class` is the one that the object was put with, or that a lifecycle rule gave it, unless that is STANDARD.
    """

    content_type: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    user: dict[str, str] = field(default_factory=dict)
    checksums: dict[str, str] = field(default_factory=dict)
    checksum_type: str = ""
    part_sizes: list[int] = field(default_factory=list)
    part_checksums: list[str] = field(default_factory=list)
    owner: str = ""
    acl: str = ""
    upload_id: str = ""
    storage_class: str = ""
    tags: dict[str, str] = field(default_factory=dict)

    def pack(self) -> bytes:
        names = {
            "content_type": "t",
            "headers": "h",
            "user": "u",
            "checksums": "c",
            "checksum_type": "y",
            "part_sizes": "p",
            "part_checksums": "q",
            "owner": "o",
            "acl": "a",
            "upload_id": "i",
            "storage_class": "k",
            "tags": "g",
        }
        return pack_json({short: value for name, short in names.items() if (value := getattr(self, name))})

    @classmethod
    def unpack(cls, raw: bytes) -> ObjectMetadata:
        row = unpack_json(raw)
        return cls(
            row.get("t", ""), row.get("h", {}), row.get("u", {}), row.get("c", {}), row.get("y", ""), row.get("p", []), row.get("q", []), row.get("o", ""), row.get("a", ""), row.get("i", ""), row.get("k", ""), row.get("g", {}),
        )  # fmt: skip


@dataclass(slots=True, frozen=True)
class UploadRow:
    """An open multipart upload. `number` keys its parts."""

    number: int
    upload_id: str
    initiated_ns: int
    owner: str
    acl: str
    metadata: dict[str, Any]
    checksum_algorithm: str
    checksum_type: str

    def pack(self) -> bytes:
        return pack_json(asdict(self))


@dataclass(slots=True, frozen=True)
class PartRow:
    """An uploaded part. `etag` is the MD5 in hex, `checksum` the base64 value of `algorithm`, if there was one.

    `crc64nvme` is computed when the upload names no algorithm: the object's checksum comes from it.
    """

    inode: int
    size: int
    etag: str
    mtime_ns: int
    checksum: str = ""
    algorithm: str = ""
    crc64nvme: str = ""

    def checksum_of(self, algorithm: str) -> str:
        """The value of one algorithm; "" if the part has none."""
        if algorithm == self.algorithm:
            return self.checksum
        return self.crc64nvme if algorithm == "CRC64NVME" else ""

    def pack(self) -> bytes:
        return pack_json(asdict(self))


_CHANGE = struct.Struct(">QQQB")


@dataclass(slots=True, frozen=True)
class ChangeRow:
    """A mount that is not `origin` must forget `entry` of directory `parent` and what it knows of `inode`.

    An empty entry stands for the inode alone; `orphan` says that the inode has no name left and waits for its users.
    """

    origin: int
    parent: int
    inode: int
    orphan: bool
    entry: bytes

    def pack(self) -> bytes:
        return _CHANGE.pack(self.origin, self.parent, self.inode, self.orphan) + self.entry

    @classmethod
    def unpack(cls, raw: bytes) -> ChangeRow:
        origin, parent, inode, orphan = _CHANGE.unpack_from(raw)
        return cls(origin, parent, inode, bool(orphan), raw[_CHANGE.size :])


def prefix_range(prefix: bytes) -> tuple[bytes, bytes]:
    """Start and stop of a scan over the keys with `prefix` (a table letter and whole numbers, never all 0xff)."""
    return prefix, prefix_end(prefix)
