"""`make run`: a demo volume under ./var/demo, made once, served until Ctrl-C."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VAR = ROOT / "var"
VOLUME, MOUNT, KEYS = VAR / "demo", VAR / "mount", VAR / "demo.json"
STRATUM = [sys.executable, "-m", "stratum.cli.main"]


def main() -> int:
    if not (VOLUME / "stratum.toml").exists():
        VAR.mkdir(exist_ok=True)
        made = subprocess.run(
            [*STRATUM, "init", str(VOLUME), "--mount", str(MOUNT), "--json"], check=True, capture_output=True, text=True
        ).stdout
        fd = os.open(KEYS, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(made)
        subprocess.run([*STRATUM, "bucket", "create", str(VOLUME), "demo"], check=True, capture_output=True)
    facts = json.loads(KEYS.read_text())
    server = subprocess.Popen([*STRATUM, "serve", str(VOLUME), "--json"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        if not server.stdout.readline():
            return server.wait()
        aws = ROOT / ".venv" / "bin" / "aws"
        print(
            f"\nendpoint    {facts['endpoint']}\naccess key  {facts['access_key']}\nsecret key  {facts['secret_key']}\nmount       {MOUNT}\n\n"
            f"Try, in another terminal:\n"
            f"  echo hello > {MOUNT}/demo/hello.txt\n"
            f"  AWS_ACCESS_KEY_ID={facts['access_key']} AWS_SECRET_ACCESS_KEY={facts['secret_key']} AWS_REGION=us-east-1 {aws} --endpoint-url {facts['endpoint']} s3 cp s3://demo/hello.txt -\n"
            f"  {ROOT / '.venv' / 'bin' / 'stratum'} status {VOLUME}\n\nCtrl-C stops it.\n",
            flush=True,
        )
        return server.wait()
    except KeyboardInterrupt:
        return server.wait()


if __name__ == "__main__":
    sys.exit(main())
