"""Quotas: exact whoever writes, and never in the way of what does not grow."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from stratum import buckets, quotas
from stratum.errors import InvalidArgument, QuotaExceeded
from stratum.identity import Identities
from stratum.quotas import UNLIMITED, Quota
from tests.support import BUCKET, delete, get, put

if TYPE_CHECKING:
    from stratum.transaction import MetadataTransaction
    from stratum.volume import Volume


def limit(opened: Volume, quota: Quota | None, bucket: str = BUCKET) -> None:
    opened.mutate(lambda tx: quotas.set_bucket(tx, buckets.get(tx, bucket).inode, quota), frees=True)


def used(opened: Volume, bucket: str = BUCKET) -> tuple[int, int]:
    with opened.snapshot() as reader:
        return buckets.usage(reader, buckets.get(reader, bucket))


def test_a_quota_is_exact_under_concurrent_writers(opened: Volume) -> None:
    limit(opened, Quota(bytes=100_000, objects=37))
    refused = []

    def write(writer: int) -> None:
        for number in range(16):
            try:
                put(opened, f"{writer}/{number}", b"x" * 1000)
            except QuotaExceeded:
                refused.append(number)

    threads = [threading.Thread(target=write, args=(writer,)) for writer in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert used(opened) == (37, 37_000)
    assert len(refused) == 8 * 16 - 37


def test_a_quota_of_a_user_follows_its_buckets(opened: Volume) -> None:
    """Buckets come, go and change hands after the quota was set, in transactions that are committed and in ones that are not."""
    with opened.snapshot() as reader:
        owner = buckets.get(reader, BUCKET).owner
    opened.mutate(lambda tx: quotas.set_user(tx, owner, Quota(bytes=1000)))
    put(opened, "a", b"x" * 400)
    opened.mutate(lambda tx: buckets.create(tx, "second", owner))
    put(opened, "a", b"x" * 600, bucket="second")
    with pytest.raises(QuotaExceeded, match="1000 bytes"):
        put(opened, "b", b"x", bucket="second")

    def create_and_fail(tx: MetadataTransaction) -> None:
        buckets.create(tx, "third", owner)
        assert quotas.owned_by(tx, owner).keys() >= {buckets.get(tx, "third").inode}
        raise InvalidArgument("not after all")

    with pytest.raises(InvalidArgument):
        opened.mutate(create_and_fail)
    with opened.snapshot() as reader:
        assert sorted(quotas.owned_by(reader, owner).values()) == sorted([BUCKET, "second"])
    opened.mutate(lambda tx: buckets.change(tx, "second", owner="somebody"))
    put(opened, "b", b"x" * 600)
    delete(opened, "a", bucket="second")
    opened.mutate(lambda tx: buckets.remove(tx, "second"))
    with opened.snapshot() as reader:
        assert quotas.owned_by(reader, "somebody") == {}


def test_the_last_byte_fits_and_one_more_does_not(opened: Volume) -> None:
    limit(opened, Quota(bytes=1000))
    put(opened, "a", b"x" * 1000)
    with pytest.raises(QuotaExceeded, match="1000 bytes"):
        put(opened, "b", b"x")
    put(opened, "b", b"")
    put(opened, "a", b"y" * 1000)
    with pytest.raises(QuotaExceeded):
        put(opened, "a", b"z" * 1001)
    assert get(opened, "a") == b"y" * 1000


def test_above_a_quota_what_does_not_grow_works(opened: Volume) -> None:
    put(opened, "a", b"x" * 5000)
    put(opened, "b", b"x" * 5000)
    limit(opened, Quota(bytes=100, objects=1))
    put(opened, "a", b"x" * 4000)
    with pytest.raises(QuotaExceeded):
        put(opened, "a", b"x" * 4001)
    assert delete(opened, "b")
    assert delete(opened, "a")
    put(opened, "c", b"x" * 100)
    assert used(opened) == (1, 100)


def test_a_users_quota_is_over_all_buckets_of_the_user(opened: Volume) -> None:
    user, _, _ = Identities(opened).add_user("ann")

    def prepare(tx: MetadataTransaction) -> None:
        buckets.create(tx, "first", user.user_id)
        buckets.create(tx, "second", user.user_id)
        quotas.set_user(tx, user.user_id, Quota(bytes=3000))

    opened.mutate(prepare)
    put(opened, "a", b"x" * 2000, bucket="first")
    put(opened, "a", b"x" * 5000)
    with pytest.raises(QuotaExceeded, match="its owner"):
        put(opened, "a", b"x" * 1001, bucket="second")
    put(opened, "a", b"x" * 1000, bucket="second")
    with opened.snapshot() as reader:
        listed = {(item.kind, item.name): (item.objects, item.bytes) for item in quotas.everything(reader)}
        assert quotas.room(reader, buckets.get(reader, "first").inode) == (UNLIMITED, 0)
        assert quotas.room(reader, buckets.get(reader, BUCKET).inode) == (UNLIMITED, UNLIMITED)
    assert listed == {("user", "ann"): (2, 3000)}
    Identities(opened).remove_user("ann")
    with opened.snapshot() as reader:
        assert not quotas.any_set(reader)


def test_a_bucket_takes_its_quota_with_it(opened: Volume) -> None:
    limit(opened, Quota(objects=5))
    opened.mutate(lambda tx: buckets.remove(tx, BUCKET), frees=True)
    with opened.snapshot() as reader:
        assert not quotas.any_set(reader)
        assert list(quotas.everything(reader)) == []


def test_a_quota_is_positive_and_can_be_taken_away(opened: Volume) -> None:
    for wrong in (Quota(), Quota(bytes=-1), Quota(objects=-5, bytes=3)):
        with pytest.raises(InvalidArgument, match="above 0"):
            limit(opened, wrong)
    limit(opened, Quota(objects=1))
    limit(opened, Quota(objects=2))
    limit(opened, None)
    limit(opened, None)
    for number in range(3):
        put(opened, f"{number}", b"x")
    with opened.snapshot() as reader:
        assert not quotas.any_set(reader)
