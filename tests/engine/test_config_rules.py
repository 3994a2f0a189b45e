"""Every key of the configuration: what it may be, and that a refusal says so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stratum import config, config_rules
from stratum.config import SETTINGS, Setting
from stratum.errors import ConfigInvalid
from tests.support import make_volume, stratum

if TYPE_CHECKING:
    from pathlib import Path

WRONG_NUMBERS = ["nan", "inf", "-inf", "-1", "-0.001", "1e300", "9" * 30, "9" * 5000, '"5"', "true", "[]"]
WRONG_TEXTS = {
    "volume.hot": ['[""]', '["hot", "hot"]', "[]", "[5]", '"hot"', '["a\\u0000b"]'],
    "volume.ec": ['"2"', '"0+1"', '"x+y"', '"²+1"'],
    "s3.listen": [
        '"127.0.0.1"',
        '":9000"',
        '"127.0.0.1:65536"',
        '"127.0.0.1:²"',
        '"a b:1"',
        '"127.0.0.1:-1"',
        '"/x:1"',
    ],
    "s3.region": ['""', '"us east"', '"a/b"'],
    "s3.domain": ['"a b"', '"/x"', '"http://x"', '"x..y"'],
    "s3.trusted_proxies": ['["nowhere"]', '"10.0.0.1"'],
    "admin.listen": ['"x"', '"0.0.0.0:9"'],
    "alerts.webhook": ['"ftp://x"', '"http://"', '"http://x:99999"', '"x"'],
    "alerts.email_to": ['["ada"]', '["a@b@c"]', '["a b@c"]', '"ada@example.org"', '["ada@example.org\\nBcc: x@y"]'],
    "alerts.email_from": ['""', '"ada"'],
    "alerts.smtp": ['"mail"', '"mail:0"'],
    "mount.path": ['"mnt"', '"./mnt"', '"/a\\nb"'],
    "mount.helper": ['"socket"'],
    "mount.bucket": ['"a/b"'],
    "audit.folder": ['""'],
}


def key_of(setting: Setting) -> str:
    return f"{setting.section}.{setting.name}"


@pytest.mark.parametrize("setting", SETTINGS, ids=key_of)
def test_every_key_has_a_rule_and_keeps_it(setting: Setting) -> None:
    key = key_of(setting)
    rules = [table for table in (config_rules.RANGES, config_rules.CHOICES, config_rules.FORMS) if key in table]
    assert len(rules) == (0 if isinstance(setting.default, bool) else 1)
    wrong = ["5", '"yes"'] if isinstance(setting.default, bool) else WRONG_TEXTS.get(key, ["5", "nan", "true"])
    if key in config_rules.RANGES:
        least, most = config_rules.RANGES[key]
        assert least <= setting.default <= most
        wrong = WRONG_NUMBERS
    if key in config_rules.CHOICES:
        wrong = ['"other"', '""', "nan"]
    for value in wrong:
        with pytest.raises(ConfigInvalid) as refused:
            config.parse(f"[{setting.section}]\n{setting.name} = {value}\n", "stratum.toml")
        assert refused.value.message.startswith("stratum.toml")
        if len(value) < 40:
            assert key in refused.value.message


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[s3]\nlisten = "127.0.0.1:9000"\n[admin]\nlisten = "127.0.0.1:9000"', "are one address"),
        ('[s3]\nlisten = "0.0.0.0:9000"\n[admin]\nlisten = "127.0.0.1:9000"', "are one address"),
        ("[tiering]\nlow_percent = 90.0", "must rise"),
        ("[s3]\nworkers = 1000", "workers = 1000 is outside its range, from 1 to 128; the default is 2"),
        ("a = " + "[" * 5000, "not TOML"),
    ],
)
def test_keys_that_do_not_go_together(text: str, message: str) -> None:
    with pytest.raises(ConfigInvalid, match=message):
        config.parse(text, "stratum.toml")


def test_a_file_that_is_not_utf_8_says_where(tmp_path: Path) -> None:
    root = tmp_path / "v"
    make_volume(root)
    file = root / "stratum.toml"
    whole = file.read_bytes()
    file.write_bytes(b"# one\n# caf\xe9\n" + whole)
    done = stratum("status", root, expect=3)
    assert "byte 11, in line 2" in done.stderr
    assert "Traceback" not in done.stderr
    file.write_bytes(whole)
    assert stratum("config", "check", root).returncode == 0


def test_check_finds_what_is_not_there(tmp_path: Path) -> None:
    root = tmp_path / "v"
    make_volume(root)
    file = root / "stratum.toml"
    text = (
        file.read_text()
        .replace('token_file = ""', 'token_file = "/nowhere/token"', 1)
        .replace('hot = ["hot"]', 'hot = ["hot", "/nowhere/hot"]')
    )
    file.write_text(text)
    done = stratum("config", "check", root, expect=3)
    assert "admin.token_file = '/nowhere/token'" in done.stderr
    assert "volume.hot = '/nowhere/hot'" in done.stderr


def test_init_refuses_what_the_configuration_would(tmp_path: Path) -> None:
    stratum("init", tmp_path / "v", "--s3-listen", "127.0.0.1:9", "--admin-listen", "127.0.0.1:9", expect=3)
    done = stratum("init", tmp_path / "v", "--hot", tmp_path / "caf\udce9", "--create", expect=3)
    assert "UTF-8" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "v").exists()
