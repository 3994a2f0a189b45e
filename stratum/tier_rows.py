"""Values of the tables of the tiers. stratum/schema.py lists the tables and their keys."""

from __future__ import annotations

import enum
import struct
from dataclasses import asdict, dataclass, field

from stratum.errors import VolumeInvalid
from stratum.schema import pack_json, unpack_json

_ACCESS = struct.Struct(">BQQQQQQQdd8I")
READS_REMEMBERED = 8


@dataclass(slots=True)
class AccessRow:
    """What is known of how a file is used. Moments are whole seconds since 1970; `recent_reads` has the newest last.

    `tier` and `last_access_s` are also the file's key in the b table. The two averages are reads a day, halved in a day and in
    a week without reads, as of `last_read_s`.
    """

    tier: int
    last_access_s: int
    created_s: int
    last_read_s: int = 0
    last_write_s: int = 0
    reads: int = 0
    read_bytes: int = 0
    moved_s: int = 0
    average_fast: float = 0.0
    average_slow: float = 0.0
    recent_reads: tuple[int, ...] = (0,) * READS_REMEMBERED

    def pack(self) -> bytes:
        return _ACCESS.pack(
            self.tier, self.last_access_s, self.created_s, self.last_read_s, self.last_write_s, self.reads, self.read_bytes, self.moved_s,
            self.average_fast, self.average_slow, *self.recent_reads,
        )  # fmt: skip

    @classmethod
    def unpack(cls, raw: bytes) -> AccessRow:
        fields = _ACCESS.unpack(raw)
        return cls(*(*fields[:10], fields[10:]))

    def key(self, inode: int) -> bytes:
        return recency_key(self.tier, self.last_access_s, inode)


def recency_key(tier: int, last_access_s: int, inode: int) -> bytes:
    return b"b" + bytes((tier,)) + struct.pack(">QQ", last_access_s, inode)


_COPY = struct.Struct(">QQQ")


@dataclass(slots=True, frozen=True)
class CopyRow:
    """An extent's bytes lie at `offset` of `pack`. In the q table `length` is the extent's."""

    pack: int
    offset: int
    length: int

    def encode(self) -> bytes:
        return _COPY.pack(self.pack, self.offset, self.length)

    @classmethod
    def decode(cls, raw: bytes) -> CopyRow:
        return cls(*_COPY.unpack(raw))


class Tier(enum.IntEnum):
    """Where bytes lie. The value is stored; the smaller the hotter."""

    HOT = 1
    WARM = 2
    COLD = 3


TIER_OF_CLASS = {"STANDARD": Tier.HOT, "STANDARD_IA": Tier.WARM, "GLACIER_IR": Tier.COLD, "GLACIER": Tier.COLD}
"""The storage classes of S3 that there are, and where an object of each belongs."""

COPYING, VALID, CONDEMNED = "copying", "valid", "condemned"


@dataclass(slots=True)
class PackRow:
    """A pack. `state` is COPYING from before its first byte is written, VALID once it was verified, CONDEMNED when it holds
    nothing that is wanted.

    Warm: shard number i of `k` + `m` lies on disk `disks[i]` (0: it could not be written), its data behind `head_bytes`. Cold: `remote` names the ColdRow,
    `key` the object, which is the pack and behind it a description. `digest` is the SHA-256 of the pack. `due_s` is when the
    bytes of a condemned pack may go, 0 at once. `intent` lists [extent, generation, offset, length] while it is COPYING.
    """

    tier: int
    state: str
    session: int
    length: int
    digest: str
    created_s: int
    extents: int = 0
    live_bytes: int = 0
    k: int = 0
    m: int = 0
    shard_bytes: int = 0
    head_bytes: int = 0
    disks: list[int] = field(default_factory=list)
    remote: str = ""
    key: str = ""
    version: str = ""
    upload_id: str = ""
    storage_class: str = ""
    verified_s: int = 0
    due_s: int = 0
    intent: list[list[int]] = field(default_factory=list)

    def encode(self) -> bytes:
        return pack_json({name: value for name in self.__slots__ if (value := getattr(self, name))})

    @classmethod
    def decode(cls, raw: bytes) -> PackRow:
        """Raises `VolumeInvalid` for a state this version does not know: a newer one wrote it."""
        row = unpack_json(raw)
        if row["state"] not in {COPYING, VALID, CONDEMNED}:
            raise VolumeInvalid(f"a pack is in the unknown state {row['state']!r}; use the newer version that wrote it")
        return cls(**{"session": 0, "length": 0, "digest": "", **row})


@dataclass(slots=True)
class DiskRow:
    """A folder of the warm tier. `state`: "active", "draining" (its shards move away) or "replaced" (by `successor`)."""

    path: str
    added_s: int
    state: str = "active"
    successor: int = 0

    def encode(self) -> bytes:
        return pack_json(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> DiskRow:
        return cls(**unpack_json(raw))


@dataclass(slots=True)
class ColdRow:
    """A remote of the cold tier. Secrets are not here: `credentials` and `encryption_key` name files.

    `kind` is "s3" or "directory"; `state` "active" or "draining"; `can` is what the probe found the remote to do.
    """

    kind: str
    endpoint: str
    bucket: str
    prefix: str
    region: str
    credentials: str
    encryption_key: str
    storage_class: str
    epoch: int
    added_s: int
    state: str = "active"
    can: dict[str, bool] = field(default_factory=dict)

    def encode(self) -> bytes:
        return pack_json(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> ColdRow:
        return cls(**unpack_json(raw))


@dataclass(slots=True)
class MoveRow:
    """A move that was asked for. `state`: "waiting", "moving" or "failed" (then `error` says why)."""

    tier: int
    cause: str
    asked_ns: int
    state: str = "waiting"
    error: str = ""
    attempts: int = 0
    not_before_s: float = 0.0

    def encode(self) -> bytes:
        return pack_json(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> MoveRow:
        return cls(**unpack_json(raw))


@dataclass(slots=True)
class RestoreRow:
    """A temporary copy in the hot tier. `state`: "ongoing" or "ready"; `days` 0: for good."""

    state: str
    days: int
    asked_s: int
    expires_s: int = 0

    def encode(self) -> bytes:
        return pack_json(asdict(self))

    @classmethod
    def decode(cls, raw: bytes) -> RestoreRow:
        return cls(**unpack_json(raw))
