"""A remote that is in trouble as a whole says which, costs no data, ends who waits, and is not logged again and again."""

from __future__ import annotations

import json
import os
import shutil
from typing import TYPE_CHECKING, Any

import boto3
import pytest

from stratum import cold, cold_admin, health, hints, packs, remote_trouble
from stratum.errors import ForeignRemote, StratumError, TierUnavailable
from stratum.remote_trouble import CODES, Trouble
from stratum.schema import key_u64
from stratum.tier_rows import ColdRow, MoveRow, Tier
from stratum.tiering import leftovers, remote_watch
from stratum.tiering.daemon import RETRY_S, Tierd
from stratum.tiering.mover import Mover
from stratum.volume import Volume
from tests.support import delete, get, put
from tests.tiers.conftest import directory_row, gauge_of, make_tiered
from tests.tiers.fault_proxy import FaultProxy

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

DATA = os.urandom(300_000)
WORDS = {
    Trouble.GONE: "is not there", Trouble.DENIED: "credentials", Trouble.UNREACHABLE: "does not answer", Trouble.NO_MARKER: "marker stratum-instance.json is gone",
    Trouble.FOREIGN: "belongs to the volume", Trouble.SUPERSEDED: "rebuilt volume has taken",
}  # fmt: skip
UNREADABLE = {Trouble.GONE, Trouble.DENIED, Trouble.UNREACHABLE}


class Far:
    """A remote of either kind that gets into trouble and out of it again."""

    def __init__(self, kind: str, folder: Path, moto: str) -> None:
        self.kind = kind
        self.folder = folder / "far"
        self.bucket = f"trouble-{os.urandom(6).hex()}"
        self.proxy = FaultProxy(moto)
        self.s3: Any = boto3.client("s3", endpoint_url=moto, aws_access_key_id="a", aws_secret_access_key="s", region_name="us-east-1")  # fmt: skip
        credentials = folder / "credentials"
        credentials.write_text('{"access_key": "a", "secret_key": "s"}')
        credentials.chmod(0o600)
        self.row = ColdRow("s3", self.proxy.endpoint, self.bucket, "", "", str(credentials), "", "", 0, 0)
        if kind == "directory":
            self.folder.mkdir()
            self.row = directory_row(self.folder)

    def put_marker(self, document: dict[str, Any]) -> None:
        text = json.dumps(document).encode()
        if self.kind == "directory":
            (self.folder / "objects" / cold.MARKER).write_bytes(text)
        else:
            self.s3.put_object(Bucket=self.bucket, Key=cold.MARKER, Body=text)

    def remove_marker(self) -> None:
        if self.kind == "directory":
            (self.folder / "objects" / cold.MARKER).unlink()
        else:
            self.s3.delete_object(Bucket=self.bucket, Key=cold.MARKER)

    def remove(self) -> None:
        if self.kind == "directory":
            shutil.move(self.folder, self.folder.with_name("elsewhere"))
            return
        for item in self.s3.list_objects_v2(Bucket=self.bucket).get("Contents", []):
            self.s3.delete_object(Bucket=self.bucket, Key=item["Key"])
        self.s3.delete_bucket(Bucket=self.bucket)

    def get_into(self, trouble: Trouble, instance: str) -> None:
        if trouble == Trouble.GONE:
            self.remove()
        elif trouble == Trouble.DENIED:
            self.proxy.plan = lambda *_: "403"
        elif trouble == Trouble.UNREACHABLE:
            self.proxy.plan = lambda *_: "refuse"
        elif trouble == Trouble.NO_MARKER:
            self.remove_marker()
        elif trouble == Trouble.FOREIGN:
            self.put_marker({"instance": "0" * 32, "epoch": 1})
        else:
            self.put_marker({"instance": instance, "epoch": 7})


@pytest.fixture(params=["directory", "s3"])
def far(request: pytest.FixtureRequest, tmp_path: Path, moto: str) -> Iterator[Far]:
    made = Far(request.param, tmp_path, moto)
    yield made
    made.proxy.stop()


@pytest.fixture
def opened(far: Far, tmp_path: Path) -> Iterator[Volume]:
    root = make_tiered(tmp_path, remote=False, cold__request_s_max=10.0, cold__recall_s_max=5.0)
    with Volume(root, "test") as found:
        cold_admin.add(found, "far", far.row, create_bucket=far.kind == "s3")
        cold_remote = found.cold.remote("far")[1]
        cold_remote.retrying._pause = lambda _: None
        yield found


def told(opened: Volume) -> dict[str, str]:
    """What health says of remotes."""
    codes = set(CODES.values())
    return {item.code: item.what for item in health.examine(opened) if item.code in codes}


def trouble_in(far: Far, trouble: Trouble) -> None:
    if far.kind == "directory" and trouble in {Trouble.DENIED, Trouble.UNREACHABLE}:
        pytest.skip("a directory has neither credentials nor an address")


@pytest.mark.parametrize("trouble", list(Trouble))
def test_what_is_wrong_with_a_remote_is_said(far: Far, opened: Volume, trouble: Trouble) -> None:
    trouble_in(far, trouble)
    number = put(opened, "cold", DATA).number
    Mover(opened).move([number], Tier.COLD, cause="test", alone=True)
    watch = remote_watch.RemoteWatch(opened)
    watch.look()
    assert told(opened) == {}
    far.get_into(trouble, opened.instance)
    opened.cold._markers_s.clear()
    for path in opened.root.glob("recall/*"):
        path.unlink()
    watch.look()
    watch.look()
    assert list(told(opened)) == [CODES[trouble]]
    document = cold_admin.check(opened, "far")
    other = put(opened, "other", DATA).number
    with pytest.raises(TierUnavailable if trouble in UNREADABLE else ForeignRemote) as caught:
        Mover(opened).move([other], Tier.COLD, cause="test", alone=True)
    for what in (told(opened)[CODES[trouble]], document["error"], caught.value.message):
        assert WORDS[trouble] in what
        assert "'far'" in what
        assert "{" not in what
        assert "None" not in what
    assert document["trouble"] == trouble.value
    if trouble in UNREADABLE:
        with pytest.raises(TierUnavailable):
            get(opened, "cold")
        assert not [item for item in health.examine(opened) if item.code == "STR-DATA-DAMAGED"], "nothing says so yet"
    else:
        assert get(opened, "cold") == DATA


@pytest.mark.parametrize("trouble", [Trouble.GONE, Trouble.NO_MARKER, Trouble.DENIED])
def test_who_waits_for_a_move_is_told_and_removals_back_off(far: Far, opened: Volume, trouble: Trouble, capfd: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    trouble_in(far, trouble)
    for at in range(30):
        number = put(opened, f"k{at}", DATA).number
        Mover(opened).move([number], Tier.COLD, cause="test", alone=True)
        delete(opened, f"k{at}")
    from stratum.housekeeping import run_once

    run_once(opened)
    far.get_into(trouble, opened.instance)
    opened.cold._markers_s.clear()
    other = put(opened, "other", DATA).number
    opened.mutate(lambda tx: hints.ask(tx, other, MoveRow(int(Tier.COLD), "test", 1)), frees=True)
    now = [1000.0]
    worker = Tierd(opened, gauge=gauge_of(opened, [10.0]), monotonic=lambda: now[0])
    capfd.readouterr()
    for _ in range(120):  # a minute
        worker.step()
        now[0] += RETRY_S / 10
    with opened.snapshot() as reader:
        row = MoveRow.decode(reader.get(key_u64(b"m", other)) or b"")
        waiting = packs.setting(reader, "tierd")["troubles"]
    assert WORDS[trouble] in row.error
    assert "30 packs wait to be removed" in waiting["condemned"]
    assert WORDS[trouble] in waiting["condemned"]
    lines = capfd.readouterr().err.splitlines()
    assert 0 < len(lines) <= 6, lines
    with pytest.raises(TierUnavailable):
        leftovers.remove_condemned(Mover(opened))


def test_a_remote_that_is_right_again_goes_on(far: Far, opened: Volume) -> None:
    number = put(opened, "k", DATA).number
    far.get_into(Trouble.FOREIGN, opened.instance)
    watch = remote_watch.RemoteWatch(opened)
    watch.look()
    assert list(told(opened)) == [CODES[Trouble.FOREIGN]]
    far.put_marker({"instance": opened.instance, "epoch": 1})
    watch.look()
    assert told(opened) == {}
    Mover(opened).move([number], Tier.COLD, cause="test", alone=True)
    assert get(opened, "k") == DATA


def test_a_lost_marker_is_put_back_where_the_objects_are(far: Far, opened: Volume) -> None:
    number = put(opened, "k", DATA).number
    Mover(opened).move([number], Tier.COLD, cause="test", alone=True)
    with pytest.raises(StratumError, match="has a marker"):
        cold_admin.restore_marker(opened, "far")
    far.remove_marker()
    cold_admin.restore_marker(opened, "far")
    opened.cold.check_marker("far", anew=True)
    far.remove_marker()
    raw = opened.cold.remote("far")[1].raw
    for info in list(raw.list("v1/")):
        raw.delete(info.key)
    with pytest.raises(ForeignRemote, match="no marker was written"):
        cold_admin.restore_marker(opened, "far")


def test_every_trouble_has_a_code() -> None:
    assert set(remote_trouble.CODES) == set(Trouble)
    assert set(remote_trouble.CODES.values()) <= set(health.CODES)
