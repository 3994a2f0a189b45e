"""`make deb`: the Debian package, with a virtual environment of its own below /usr/lib/stratum.

The same tree and SOURCE_DATE_EPOCH (the time of the last commit, if it is not set) give the same files in it.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from deploy.debian import manual, sbom

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
HOME = "usr/lib/stratum"
LAUNCHERS = {"usr/bin/stratum": "stratum.cli.main", "usr/sbin/mount.stratum": "stratum.cli.mount_helper"}
CONTROL = """Package: stratum
Version: {version}
Architecture: {architecture}
Maintainer: The Stratum maintainers <stratum@localhost>
Section: admin
Priority: optional
Installed-Size: {kibibytes}
Depends: fuse3, libc6 (>= 2.36), libfuse3-3 (>= 3.14), libgcc-s1, libstdc++6, python3 (>= 3.11), python3 (<< 3.12), systemd
Suggests: prometheus
Description: one volume that is a POSIX file system and an S3 endpoint at once
 Stratum keeps hot data on fast disks, warm data erasure-coded over many disks
 and cold data in a remote S3 bucket, moves it by evidence, and can say why.
 A file under the mount and an object behind the endpoint are the same bytes.
 .
 The package neither makes nor removes a volume: `stratum init` does, and prints
 the only access key.
"""


def run(*words: str | Path, quiet: bool = False) -> None:
    """Without $PYTHONPATH, which would let pip find us installed already."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    subprocess.run(
        [str(word) for word in words], check=True, cwd=ROOT, env=clean, stdout=subprocess.DEVNULL if quiet else None
    )


def install(source: Path, target: Path, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(mode)


def write(target: Path, text: str | bytes, mode: int = 0o644) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(text.encode() if isinstance(text, str) else text)
    target.chmod(mode)


def packed(text: str) -> bytes:
    return gzip.compress(text.encode(), 9, mtime=0)


def environment(stage: Path, work: Path) -> None:
    """The program with what it needs, as its lock file names it; nothing else, and no trace of where it was built."""
    home = stage / HOME
    run("/usr/bin/python3", "-m", "venv", "--without-pip", home)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--python", home / "bin" / "python3")
    run(*pip, "install", "--no-compile", "--require-hashes", "-r", "requirements.lock")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", work, ROOT, quiet=True)
    run(*pip, "install", "--no-compile", "--no-deps", *work.glob("*.whl"))
    for path in (home / "bin").iterdir():
        if not path.name.startswith("python"):
            path.unlink()
    (home / "bin" / "python3").unlink()
    (home / "bin" / "python3").symlink_to("../../../bin/python3")
    lines = (home / "pyvenv.cfg").read_text().splitlines()
    (home / "pyvenv.cfg").write_text("\n".join(line for line in lines if not line.startswith("command")) + "\n")
    for path in sorted(home.rglob("*")):
        if path.name == "__pycache__" and path.is_dir():
            shutil.rmtree(path)
        elif path.name in {"direct_url.json", "REQUESTED"}:
            path.unlink()
        elif path.is_file() and not path.is_symlink():
            path.chmod(0o755 if path.parent == home / "bin" else 0o644)
            if re.search(r"\.so(\.|$)", path.name):
                run("strip", "--strip-unneeded", path)
    for place, module in LAUNCHERS.items():
        write(stage / place, f"#!/{HOME}/bin/python3 -I\nfrom {module} import entry\n\nentry()\n", 0o755)


def system_files(stage: Path) -> None:
    units = ROOT / "systemd"
    for path in units.iterdir():
        if path.suffix in {".service", ".socket", ".timer", ".target"}:
            install(path, stage / "lib/systemd/system" / path.name)
    install(units / "stratum.env", stage / "etc/stratum/stratum.env")
    for kind in ("sysusers.d", "tmpfiles.d"):
        install(units / kind / "stratum.conf", stage / "usr/lib" / kind / "stratum.conf")
    for path in (*(ROOT / "deploy/prometheus").glob("*.yml"), *(ROOT / "deploy/grafana").glob("*.json")):
        if path.name != "alerts_test.yml":
            install(path, stage / "usr/share/stratum" / path.parent.name / path.name)


def documents(stage: Path, version: str, date: str) -> None:
    folder = stage / "usr/share/doc/stratum"
    for name in ("README.md", "SEMANTICS.md", "SECURITY.md"):
        install(ROOT / name, folder / name)
    for path in (ROOT / "docs/operations").glob("*.md"):
        install(path, folder / "operations" / path.name)
    install(HERE / "copyright", folder / "copyright")
    entry = f"stratum ({version}) unstable; urgency=medium\n\n  * See README.md and the project's CHANGELOG.md.\n\n -- The Stratum maintainers <stratum@localhost>  {date}\n"
    write(folder / "changelog.gz", packed(entry))
    write(folder / "sbom.cdx.json", json.dumps(sbom.document(stage / HOME, version), indent=1) + "\n")
    install(HERE / "lintian-overrides", stage / "usr/share/lintian/overrides/stratum")
    for name, text in manual.pages(version).items():
        write(stage / f"usr/share/man/man{name[-1]}/{name}.gz", packed(text))


def control(stage: Path, version: str) -> None:
    files = [path for path in sorted(stage.rglob("*")) if path.is_file() and not path.is_symlink()]
    sums = "".join(f"{hashlib.md5(path.read_bytes()).hexdigest()}  {path.relative_to(stage)}\n" for path in files)
    architecture = subprocess.check_output(["dpkg", "--print-architecture"], text=True).strip()
    kibibytes = sum(-(-path.stat().st_size // 1024) for path in files)
    folder = stage / "DEBIAN"
    write(folder / "control", CONTROL.format(version=version, architecture=architecture, kibibytes=kibibytes))
    write(folder / "conffiles", "/etc/stratum/stratum.env\n")
    write(folder / "md5sums", sums)
    for name in ("postinst", "prerm", "postrm"):
        install(HERE / name, folder / name, 0o755)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--version", help="(that of pyproject.toml)")
    parser.add_argument("--out", type=Path, default=ROOT / "dist")
    options = parser.parse_args()
    version = options.version or tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert importlib.metadata.version("stratum-storage"), "make install comes first"
    if "SOURCE_DATE_EPOCH" not in os.environ:
        os.environ["SOURCE_DATE_EPOCH"] = subprocess.check_output(
            ["git", "log", "-1", "--format=%ct"], cwd=ROOT, text=True
        ).strip()
    date = subprocess.check_output(
        ["date", "--rfc-email", "--utc", f"--date=@{os.environ['SOURCE_DATE_EPOCH']}"], text=True
    ).strip()
    work = ROOT / "build" / "deb"
    if work.exists():
        shutil.rmtree(work)
    stage = work / "stage"
    stage.mkdir(parents=True)
    os.umask(0o022)
    stage.chmod(0o755)
    environment(stage, work)
    system_files(stage)
    documents(stage, version, date)
    control(stage, version)
    options.out.mkdir(exist_ok=True)
    run("dpkg-deb", "--root-owner-group", "-Zxz", "--build", stage, options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
