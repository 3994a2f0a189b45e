"""A served volume whose wall clock is set forth and back by days."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

from tests.support import LeapingClock, Server, stratum

if TYPE_CHECKING:
    from pathlib import Path

BUCKET = "leaping"
DAYS_S = 3 * 86400


def test_both_faces_go_on_when_the_clock_leaps(tmp_path: Path) -> None:
    """Nothing fails, and every 200 holds at once on the other face."""
    clock = LeapingClock(tmp_path)
    server = Server(tmp_path, mount=True, environment=clock.environment).start()
    assert server.mount is not None
    try:
        client: Any = server.client()
        client.create_bucket(Bucket=BUCKET)
        path = server.mount / BUCKET / "file"
        for number, leap_s in enumerate((0, DAYS_S, 0, -DAYS_S, 0)):
            clock.set(leap_s)
            path.write_text(f"{number}")
            assert abs(path.stat().st_mtime - time.time() - leap_s) < 60
            # boto3 takes the server's word for the time when it is refused, and signs again.
            assert client.get_object(Bucket=BUCKET, Key="file")["Body"].read() == path.read_bytes()
            client.put_object(Bucket=BUCKET, Key="file", Body=b"from S3")
            assert path.read_text() == "from S3"
            path.write_text(f"again {number}")
            assert path.read_text() == f"again {number}"
        served = json.loads(stratum("status", server.root, "--json", expect=None).stdout)
        assert {row["code"] for row in served["findings"]} <= {"STR-TIERD-FAILING"}, served["findings"]
        assert json.loads(stratum("fsck", server.root, "--json").stdout)["findings"] == []
    finally:
        assert server.stop() == 0
    assert server.errors() == []
