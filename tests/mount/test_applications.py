"""What people run on a filesystem, on a real mount: databases, builds, copies, logs."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from pathlib import Path

_WRITER = """
import sqlite3, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)
database.execute("pragma journal_mode=" + sys.argv[2])
database.execute("pragma synchronous=full")
database.execute("create table if not exists t(n integer primary key, text)")
while True:
    n = database.execute("insert into t(text) values (hex(randomblob(50)))").lastrowid
    print(n, flush=True)
"""


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite_survives_the_death_of_its_writers(home: Path, journal: str) -> None:
    """A thousand transactions in all, the writer killed in the middle of many of them."""
    rng = random.Random(journal)
    path = home / f"{journal}.db"
    last = 0
    while last < 500:
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, path, journal], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        for _ in range(rng.randrange(20, 120)):
            last = int(writer.stdout.readline())
        writer.send_signal(signal.SIGKILL)
        rest = writer.stdout.read().splitlines()
        writer.wait()
        last = max([last, *(int(line) for line in rest if line)])
        with sqlite3.connect(path) as database:
            assert database.execute("pragma integrity_check").fetchone() == ("ok",)
            (count,) = database.execute("select count(*) from t").fetchone()
        database.close()
        assert count >= last, f"{last} transactions were acknowledged, {count} are there"
        last = count


_APPENDER = """
import os, sys
log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
for n in range(100):
    os.write(log, f"{sys.argv[2]:>4} {n:>6} {'x' * (n % 50)}\\n".encode())
"""


def test_twenty_processes_append_to_one_log(s3: Any, home: Path) -> None:
    log = home / "log"
    writers = [subprocess.Popen([sys.executable, "-c", _APPENDER, log, str(number)]) for number in range(20)]
    assert [writer.wait() for writer in writers] == [0] * 20
    lines = log.read_text().splitlines()
    expected = sorted(f"{p:>4} {n:>6} {'x' * (n % 50)}" for p in range(20) for n in range(100))
    assert sorted(lines) == expected
    for number in range(20):
        mine = [line for line in lines if line.startswith(f"{number:>4} ")]
        assert mine == sorted(mine), "a writer's lines changed places"
    assert s3.get_object(Bucket=home.name, Key="log")["Body"].read() == log.read_bytes()


def run(script: str, folder: Path) -> str:
    done = subprocess.run(["bash", "-euc", script], cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_rsync_copies_everything_and_then_nothing(home: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep" / "er").mkdir(parents=True)
    for number in range(60):
        (source / "deep" / f"f{number}").write_bytes(os.urandom(number * 700))
    os.link(source / "deep" / "f1", source / "deep" / "er" / "hard")
    (source / "link").symlink_to("deep/f2")
    (source / "deep" / "f3").chmod(0o640)
    os.utime(source / "deep" / "f4", ns=(1, -1_000_000_007))
    os.setxattr(source / "deep" / "f5", "user.note", b"kept")
    run(f"rsync -aHAX --checksum {source}/ {home}/copy/", home)
    again = run(f"rsync -aHAX --checksum --itemize-changes {source}/ {home}/copy/", home)
    assert again == "", "a second run found differences"
    run(f"diff -r {source} {home}/copy", home)
    copy = home / "copy" / "deep"
    assert (copy / "f1").stat().st_ino == (copy / "er" / "hard").stat().st_ino
    assert os.getxattr(copy / "f5", "user.note") == b"kept"
    assert (copy / "f4").stat().st_mtime_ns == -1_000_000_007


def test_fio_verifies_what_it_wrote(home: Path) -> None:
    common = "--ioengine=psync --size=12m --verify=crc32c --verify_fatal=1 --output-format=terse --group_reporting"
    run(f"fio --name=random --rw=randwrite --bs=4k --fsync=64 {common} --directory=.", home)
    run(f"fio --name=mixed --rw=randrw --bsrange=1k-64k --numjobs=3 {common} --directory=.", home)


def test_a_parallel_build(home: Path) -> None:
    for number in range(24):
        (home / f"unit{number}.c").write_text(f"int unit{number}(int a) {{ return a + {number}; }}\n")
    names = [f"unit{number}" for number in range(24)]
    calls = " + ".join(f"{name}(1)" for name in names)
    declarations = "".join(f"int {name}(int);\n" for name in names)
    (home / "main.c").write_text(f'#include <stdio.h>\n{declarations}int main(void) {{ printf("%d", {calls}); }}\n')
    objects = " ".join(f"{name}.o" for name in [*names, "main"])
    (home / "Makefile").write_text(f"program: {objects}\n\tgcc -o $@ $^\n%.o: %.c\n\tgcc -O1 -c -o $@ $<\n")
    run("make -s -j8", home)
    assert run("./program", home) == str(sum(1 + number for number in range(24)))
    assert "up to date" in run("make -j8", home)


def test_a_virtual_environment(home: Path) -> None:
    run(
        "python3 -m venv --without-pip env && env/bin/python -c 'import sys; assert sys.prefix.endswith(\"env\")'", home
    )
    assert run("find env -name pyvenv.cfg", home).strip() == "env/pyvenv.cfg"
