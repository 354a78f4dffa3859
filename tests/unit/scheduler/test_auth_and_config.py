"""Keys and settings: what is accepted, and what each refusal says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from insitu_scheduler.auth import AnyKeyAuthenticator, KeyFileAuthenticator, api_key, read_keys
from insitu_scheduler.config import SchedulerConfig
from insitu_wire.errors import AuthenticationError, ConfigurationError, Reason

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_file_names_its_users(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# the lab\nann: secret-1\n\nbob:secret:2\n")
    assert read_keys(path) == {"secret-1": "ann", "secret:2": "bob"}


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("# nobody\n", "holds no key"),
        ("ann:k\nhidden\n", "line 2"),
        ("ann:\n", "line 1"),
        ("ann:hidden\nbob:hidden\n", "line 2 a key for the second time"),
    ],
)
def test_a_bad_key_file_is_refused_without_showing_keys(
    tmp_path: Path, text: str, problem: str
) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        read_keys(path)
    assert "hidden" not in str(caught.value)


def test_a_missing_key_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="can not be read"):
        read_keys(tmp_path / "none")


def test_a_key_belongs_to_its_user_and_others_to_nobody() -> None:
    authenticator = KeyFileAuthenticator({"k1": "ann", "k2": "bob"})
    assert authenticator.user("k2") == "bob"
    with pytest.raises(AuthenticationError) as caught:
        authenticator.user("k3")
    assert caught.value.reason is Reason.INVALID_CREDENTIAL
    assert "k3" not in str(caught.value)


def test_without_a_key_file_each_key_is_a_user_of_its_own() -> None:
    authenticator = AnyKeyAuthenticator()
    assert authenticator.user("k1") == authenticator.user("k1") != authenticator.user("k2")
    assert "k1" not in authenticator.user("k1")


@pytest.mark.parametrize("metadata", [None, (), (("insitu-api-key", ""),), (("other", "k"),)])
def test_a_call_without_a_key_is_refused(metadata: Any) -> None:
    with pytest.raises(AuthenticationError) as caught:
        api_key(metadata)
    assert caught.value.reason is Reason.MISSING_CREDENTIAL


@pytest.mark.parametrize(
    ("settings", "flag"),
    [
        ({"port": 65536}, "--port"),
        ({"metrics_port": -2}, "--metrics-port"),
        ({"max_session_bytes": 2**30}, "--max-session-bytes"),
        ({"max_queued_sessions": 0}, "--max-queued-sessions"),
        ({"lease_ttl_seconds": 0.0}, "--lease-ttl-seconds"),
        ({"orphan_grace_seconds": -1.0}, "--orphan-grace-seconds"),
        ({"grace_seconds": float("nan")}, "--grace-seconds"),
        ({"host": "0.0.0.0"}, "--api-keys-file"),
    ],
)
def test_an_unusable_setting_is_refused_with_its_flag(
    tmp_path: Path, settings: dict[str, Any], flag: str
) -> None:
    with pytest.raises(ConfigurationError, match=flag):
        SchedulerConfig(data_dir=tmp_path, **settings)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_any_key_is_fine_on_loopback(tmp_path: Path, host: str) -> None:
    assert SchedulerConfig(data_dir=tmp_path, host=host).api_keys_file is None
