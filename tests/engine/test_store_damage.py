"""Bytes of the metadata store that were whole and are not any more: what opens, what is refused, what `fsck --repair` keeps."""

from __future__ import annotations

import json
import random
import shutil
from typing import TYPE_CHECKING

import pytest

from stratum import buckets, fsck, listing, store_repair
from stratum.errors import StoreDamaged
from stratum.kv.condition import Keep
from stratum.kv.journal import BLOCK_BYTES, Journal, Marks
from stratum.volume import Volume
from tests.support import BUCKET, longer, make_volume, new_seed, put, stratum

if TYPE_CHECKING:
    from pathlib import Path

FILES = ("data.mdb", "journal", "checkpoint")
OBJECTS = 8


def keys(opened: Volume) -> set[str]:
    with opened.snapshot() as reader:
        page = listing.list_page(reader, buckets.get(reader, BUCKET))
        return {listed[0].decode() for listed in page.objects}


class Crashed:
    """A volume that was killed a moment after a checkpoint; `states[transaction]` is what it held then."""

    def __init__(self, folder: Path) -> None:
        self.root, self.image = folder / "volume", folder / "image"
        make_volume(self.root)
        self.states: dict[int, set[str]] = {}
        with Volume(self.root, "test") as opened:
            opened.store.checkpoint()
            self.before = (self.root / "meta" / "data.mdb").read_bytes()
            self._note(opened)
            for number in range(OBJECTS):
                put(opened, f"d{number % 2}/k{number}", b"x" * 300 * number)
                self._note(opened)
            shutil.copytree(self.root, self.image)
        meta = self.image / "meta"
        journal, marks = Journal(meta / "journal"), Marks(meta / "checkpoint")
        mark = marks.newest()
        assert mark is not None
        self.records = [(number, at) for number, at, _ in journal.whole_from(mark, 0, mark.transaction)]
        journal.close()
        marks.close()
        self.bytes = {name: (meta / name).read_bytes() for name in FILES}

    def _note(self, opened: Volume) -> None:
        self.states[opened.store.last_id()] = keys(opened)

    @property
    def newest(self) -> set[str]:
        return self.states[max(self.states)]

    def lay(self, *, power_cut: bool, other_boot: bool = False) -> None:
        """Put the image back to what the crash left; after a power cut, with LMDB's pages of the checkpoint alone."""
        meta = self.image / "meta"
        for name in FILES:
            (meta / name).write_bytes(self.bytes[name])
        if power_cut:
            (meta / "data.mdb").write_bytes(self.before)
        if power_cut or other_boot:
            self.flip("checkpoint", 8, 0xFF)

    def flip(self, name: str, at: int, bits: int) -> None:
        with (self.image / "meta" / name).open("r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes((byte ^ bits,)))

    def open_keys(self) -> set[str]:
        with Volume(self.image, "test") as opened:
            return keys(opened)


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Crashed:
    return Crashed(tmp_path_factory.mktemp("crashed"))


CLASSES = {"digest": (0, 16), "epoch": (16, 24), "transaction": (24, 32), "body bytes": (32, 40), "row": (40, 46), "key and value": (46, 120)}  # fmt: skip


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
@pytest.mark.parametrize("place", CLASSES)
def test_a_flipped_bit_of_the_journal(crashed: Crashed, place: str, *, power_cut: bool) -> None:
    dice = random.Random(new_seed())
    numbers = range(len(crashed.records) - power_cut)  # after a power cut a damaged last record is a torn one
    for _ in range(longer(2, 60)):
        crashed.lay(power_cut=power_cut)
        number, at = crashed.records[dice.choice(numbers)]
        crashed.flip("journal", at + dice.randrange(*CLASSES[place]), 1 << dice.randrange(8))
        with pytest.raises(StoreDamaged, match=rf"journal at byte {at}: the record of transaction {number} does not"):
            Volume(crashed.image, "test")
        repaired = store_repair.repair(crashed.image)
        assert repaired is not None
        with Volume(crashed.image, "test") as opened:
            assert fsck.check(opened) == []
            found = keys(opened)
        if power_cut:
            assert repaired.kept is Keep.RECORDS
            assert found == crashed.states[number - 1]
            assert len(repaired.lost) == crashed.records[-1][0] - number + 1
        else:
            assert (repaired.kept, repaired.certain, repaired.lost) == (Keep.STORE, True, [])
            assert found == crashed.newest
        shutil.rmtree(repaired.aside)


def test_a_torn_last_record_is_no_damage(crashed: Crashed) -> None:
    """Nobody was told that it was committed, as far as the disk knows."""
    crashed.lay(power_cut=True)
    number, at = crashed.records[-1]
    crashed.flip("journal", at + 50, 4)
    assert crashed.open_keys() == crashed.states[number - 1]


def test_bytes_that_are_no_record_do_not_matter(crashed: Crashed) -> None:
    dice = random.Random(new_seed())
    end = crashed.records[-1][1] + BLOCK_BYTES
    for power_cut in (False, True):
        crashed.lay(power_cut=power_cut)
        for _ in range(20):
            crashed.flip("journal", dice.randrange(end, len(crashed.bytes["journal"])), 1 << dice.randrange(8))
        assert crashed.open_keys() == crashed.newest


def test_after_another_boot_the_store_as_it_stands_proves_nothing(crashed: Crashed) -> None:
    crashed.lay(power_cut=False, other_boot=True)
    number, at = crashed.records[3]
    crashed.flip("journal", at + 60, 1)
    repaired = store_repair.repair(crashed.image)
    assert repaired is not None
    assert (repaired.kept, repaired.certain) == (Keep.RECORDS, False)
    assert crashed.open_keys() == crashed.states[number - 1]
    assert (repaired.aside / "data.mdb").read_bytes() == crashed.bytes["data.mdb"]
    shutil.rmtree(repaired.aside)


@pytest.mark.parametrize("place", ["digest", "epoch", "head"])
def test_a_damaged_mark(crashed: Crashed, place: str) -> None:
    crashed.lay(power_cut=False)
    marks = Marks(crashed.image / "meta" / "checkpoint")
    newest = marks.newest()
    assert newest is not None
    marks.close()
    at = (1 + newest.epoch % 2) * BLOCK_BYTES + {"digest": 3, "epoch": 17, "head": 200}[place]
    crashed.flip("checkpoint", at, 16)
    with pytest.raises(StoreDamaged, match="checkpoint at byte"):
        Volume(crashed.image, "test")
    repaired = store_repair.repair(crashed.image)
    assert repaired is not None
    assert (repaired.kept, repaired.lost) == (Keep.STORE, [])
    with Volume(crashed.image, "test") as opened:
        assert fsck.check(opened) == []
        assert keys(opened) == crashed.newest
        put(opened, "after", b"1")
    assert crashed.open_keys() == {*crashed.newest, "after"}
    shutil.rmtree(repaired.aside)


def test_a_damaged_name_of_the_store(crashed: Crashed) -> None:
    for at in (4064, 4064 + 20):
        crashed.lay(power_cut=True)
        crashed.flip("data.mdb", at, 2)
        with pytest.raises(StoreDamaged, match="the name of the file"):
            Volume(crashed.image, "test")
        repaired = store_repair.repair(crashed.image)
        assert repaired is not None
        assert (repaired.kept, repaired.certain) == (Keep.RECORDS, True)
        assert crashed.open_keys() == crashed.newest
        shutil.rmtree(repaired.aside)


def test_fsck_says_what_is_damaged_and_what_is_lost(crashed: Crashed) -> None:
    crashed.lay(power_cut=True)
    number, at = crashed.records[2]
    crashed.flip("journal", at + 200, 1)
    told = json.loads(stratum("fsck", crashed.image, "--json", expect=1).stdout)
    assert [finding["kind"] for finding in told["findings"]] == ["damaged-store"]
    assert told["findings"][0]["thing"] == f"meta/journal at byte {at}"
    done = stratum("status", crashed.image, expect=3)
    assert f"stratum fsck {crashed.image} --repair" in done.stderr
    assert "meta restore" in done.stderr
    done = stratum("fsck", crashed.image, "--repair", expect=2)
    lost = [line for line in done.stdout.splitlines() if line.startswith("lost: ")]
    assert len(lost) == crashed.records[-1][0] - number + 1
    assert "the name 'k4'" in done.stdout, "whole records that follow the damaged one say what they changed"
    assert stratum("fsck", crashed.image).stdout.strip() == "clean"
    with Volume(crashed.image, "test") as opened:
        put(opened, "more", b"y" * 50_000)
        assert opened.session.id > 1 << 20, "no number of a lost session is given out again"


def test_a_store_that_is_open_is_left_alone(tmp_path: Path) -> None:
    make_volume(tmp_path / "v")
    with Volume(tmp_path / "v", "test"):
        assert store_repair.repair(tmp_path / "v") is None
    assert store_repair.repair(tmp_path / "v") is None
