"""Users and their access keys. Secrets are stored sealed (AES-256-GCM under `meta/seal.key`, the access key as context).

Rows are read on every request, so a removed user or a revoked key is refused by every process at once; decoded rows are
remembered by their raw bytes only, which cannot go stale.
"""

from __future__ import annotations

import base64
import secrets
import string
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from stratum import private, quotas
from stratum.errors import Exists, InvalidArgument, NoSuchAccessKey, NoSuchUser, StoreDamaged, StratumError
from stratum.schema import UserRow, pack_json, unpack_json

if TYPE_CHECKING:
    from stratum.transaction import InodeReader, MetadataTransaction
    from stratum.volume import Volume

_KEY_ALPHABET = string.ascii_uppercase + string.digits
_MEMO_MAX = 4096


@dataclass(slots=True, frozen=True)
class Credential:
    """A working key: who it speaks for, and the secret that signatures are checked against."""

    access_key: str
    secret_key: str
    user: UserRow


class Identities:
    """Users and keys of one volume."""

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._seal = AESGCM(private.seal_key(volume.meta))
        self._memo: dict[tuple[bytes, bytes], Credential] = {}
        self._owners: dict[bytes, bytes] = {}

    # -- reading ------------------------------------------------------------------------------------------------------

    def credential(self, reader: InodeReader, access_key: str) -> Credential:
        """Raises `NoSuchAccessKey`."""
        raw = reader.get(b"A" + access_key.encode()) if 0 < len(access_key) <= 128 else None
        if raw is None:
            raise NoSuchAccessKey(access_key)
        user_id = self._owners.get(raw)
        if user_id is None:
            user_id = unpack_json(raw)["user"].encode()
        user_raw = reader.get(b"R" + user_id)
        if user_raw is None:
            raise NoSuchAccessKey(access_key)
        found = self._memo.get((raw, user_raw))
        if found is None:
            found = Credential(
                access_key, self._unseal(access_key, unpack_json(raw)["secret"]), UserRow(**unpack_json(user_raw))
            )
            if len(self._memo) >= _MEMO_MAX:
                self._memo.clear()
                self._owners.clear()
            self._owners[raw] = user_id
            self._memo[raw, user_raw] = found
        return found

    def _unseal(self, access_key: str, sealed: str) -> str:
        data = base64.b64decode(sealed)
        try:
            return self._seal.decrypt(data[:12], data[12:], access_key.encode()).decode()
        except InvalidTag as error:
            raise StratumError(
                f"the secret of {access_key} does not open with meta/seal.key: one of them is damaged; `stratum key create USER` makes "
                "another key, `stratum meta restore` brings back both"
            ) from error

    def unreadable(self, reader: InodeReader) -> tuple[list[str], int]:
        """(access keys whose secret does not open, how many keys there are)."""
        failing, count = [], 0
        for key, raw in reader.scan_prefix(b"A"):
            count += 1
            try:
                self._unseal(key[1:].decode(), unpack_json(raw)["secret"])
            except (StratumError, ValueError):
                failing.append(key[1:].decode("utf-8", "backslashreplace"))
        return failing, count

    def refuse_another_seal(self) -> None:
        """Raises `StoreDamaged` if no secret opens: then it is the key that is damaged, or another volume's."""
        with self._volume.snapshot() as reader:
            failing, count = self.unreadable(reader)
        if count and len(failing) == count:
            raise StoreDamaged(
                f"{self._volume.meta / private.SEAL_KEY} opens none of the {count} access keys: it is damaged, or of another volume; "
                "`stratum meta restore` brings it back, or `stratum key create USER` makes a key that it opens"
            )

    def users(self) -> list[UserRow]:
        with self._volume.snapshot() as reader:
            return [UserRow(**unpack_json(raw)) for _, raw in reader.scan_prefix(b"R")]

    def access_keys(self) -> list[dict[str, Any]]:
        """Access keys without their secrets."""
        names = {user.user_id: user.name for user in self.users()}
        with self._volume.snapshot() as reader:
            rows = [(key[1:].decode(), unpack_json(raw)) for key, raw in reader.scan_prefix(b"A")]
        return [
            {"access_key": key, "user": names.get(row["user"], "?"), "created_ns": row["created_ns"]}
            for key, row in rows
        ]

    def find(self, reader: InodeReader, name: str) -> UserRow:
        """By name or id. Raises `NoSuchUser`."""
        for _, raw in reader.scan_prefix(b"R"):
            user = UserRow(**unpack_json(raw))
            if name in {user.name, user.user_id}:
                return user
        raise NoSuchUser(name)

    def user(self, reader: InodeReader, user_id: str) -> UserRow | None:
        raw = reader.get(b"R" + user_id.encode())
        return None if raw is None else UserRow(**unpack_json(raw))

    # -- changing -----------------------------------------------------------------------------------------------------

    def add_user(
        self, name: str, *, display_name: str = "", email: str = "", admin: bool = False
    ) -> tuple[UserRow, str, str]:
        """The user, an access key and its secret, which is never shown again."""
        if not name or len(name) > 64 or not all(c.isalnum() or c in "._-@" for c in name):
            raise InvalidArgument(f"{name!r} is not a user name: 1 to 64 letters, digits and . _ - @")
        access_key, secret_key = _new_access_key(), _new_secret_key()
        sealed = self._sealed(access_key, secret_key)

        def add(tx: MetadataTransaction) -> UserRow:
            for _, raw in tx.scan_prefix(b"R"):
                other = unpack_json(raw)
                if other["name"] == name:
                    raise Exists(f"user {name!r} exists already; choose another name")
                if email and other["email"] == email:
                    raise Exists(f"user {other['name']!r} has the address {email!r} already; addresses are unique")
            user = UserRow(uuid.uuid4().hex, name, display_name or name, email, admin, tx.now_ns)
            tx.put(b"R" + user.user_id.encode(), user.pack())
            tx.put(
                b"A" + access_key.encode(), pack_json({"user": user.user_id, "secret": sealed, "created_ns": tx.now_ns})
            )
            return user

        return self._volume.mutate(add), access_key, secret_key

    def remove_user(self, name: str) -> None:
        """Remove a user with all keys. Buckets it owns stay and are the administrators'."""

        def remove(tx: MetadataTransaction) -> None:
            user = self.find(tx, name)
            others = [UserRow(**unpack_json(raw)) for _, raw in tx.scan_prefix(b"R")]
            if user.admin and not any(other.admin and other.user_id != user.user_id for other in others):
                raise InvalidArgument(f"{name!r} is the last administrator; add another one first")
            for key, raw in list(tx.scan_prefix(b"A")):
                if unpack_json(raw)["user"] == user.user_id:
                    tx.delete(key)
            tx.delete(b"R" + user.user_id.encode())
            if quotas.of_user(tx, user.user_id) is not None:
                quotas.set_user(tx, user.user_id, None)

        self._volume.mutate(remove, frees=True)

    def create_key(self, name: str) -> tuple[str, str]:
        access_key, secret_key = _new_access_key(), _new_secret_key()
        sealed = self._sealed(access_key, secret_key)

        def create(tx: MetadataTransaction) -> None:
            user = self.find(tx, name)
            tx.put(
                b"A" + access_key.encode(), pack_json({"user": user.user_id, "secret": sealed, "created_ns": tx.now_ns})
            )

        self._volume.mutate(create)
        return access_key, secret_key

    def revoke_key(self, access_key: str) -> None:
        def revoke(tx: MetadataTransaction) -> None:
            if not access_key or tx.get(b"A" + access_key.encode()) is None:
                raise NoSuchAccessKey(access_key)
            tx.delete(b"A" + access_key.encode())

        self._volume.mutate(revoke, frees=True)

    def _sealed(self, access_key: str, secret_key: str) -> str:
        nonce = secrets.token_bytes(12)
        return base64.b64encode(nonce + self._seal.encrypt(nonce, secret_key.encode(), access_key.encode())).decode()


def _new_access_key() -> str:
    return "".join(secrets.choice(_KEY_ALPHABET) for _ in range(20))


def _new_secret_key() -> str:
    return base64.b64encode(secrets.token_bytes(30)).decode()
