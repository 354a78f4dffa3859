"""Keys and settings: what is accepted, and what each refusal says."""

from __future__ import annotations

import datetime
from typing import TYPE_CHECKING, Any

import pytest

from insitu_scheduler.auth import AnyKey, Authenticator, KeyFile, api_key, open_keys
from insitu_scheduler.bad_attempts import BadAttempts
from insitu_scheduler.config import SchedulerConfig
from insitu_scheduler.keys import Key, digest_of, new_key, read_keys, write_keys
from insitu_scheduler.limits import Limits
from insitu_scheduler.terms import Terms, Tier, clamp
from insitu_wire.errors import AuthenticationError, CapacityError, ConfigurationError, Reason

if TYPE_CHECKING:
    from pathlib import Path


def test_a_key_file_names_its_users(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# the lab\nann: secret-1\n\nbob:secret:2\n")
    found = {key.digest: key.user for key in read_keys(path)}
    assert found == {digest_of("secret-1"): "ann", digest_of("secret:2"): "bob"}


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


def check(authenticator: Authenticator, key: str, peer: str = "ipv4:10.0.0.1:50000") -> Key:
    return authenticator.check([("insitu-api-key", key)], peer)


def test_a_key_belongs_to_its_user_and_others_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann:k1\nbob:k2\n")
    authenticator = Authenticator(KeyFile(tmp_path / "keys"), BadAttempts())
    assert check(authenticator, "k2").user == "bob"
    with pytest.raises(AuthenticationError) as caught:
        check(authenticator, "k3")
    assert caught.value.reason is Reason.INVALID_CREDENTIAL
    assert "k3" not in str(caught.value)


def test_without_a_key_file_each_key_is_a_user_of_its_own() -> None:
    authenticator = Authenticator(AnyKey(), BadAttempts())
    users = [check(authenticator, key).user for key in ("k1", "k1", "k2")]
    assert users[0] == users[1] != users[2]
    assert "k1" not in users[0]


def test_a_file_of_keys_has_their_hashes_and_all_that_they_allow(tmp_path: Path) -> None:
    text, key = new_key(
        "ann", role="admin", tier=Tier.BATCH, weight=2.0, models=("lab/*",),
        limits=Limits(max_tokens=5), expires_at=datetime.datetime.now(datetime.UTC),
    )  # fmt: skip
    write_keys(tmp_path / "keys", [key])
    written = (tmp_path / "keys").read_text()
    assert text not in written
    assert text.rpartition("_")[2] not in written
    assert (tmp_path / "keys").stat().st_mode & 0o777 == 0o600
    assert read_keys(tmp_path / "keys") == [key]
    assert key.may_use("lab/llama")
    assert not key.may_use("other/llama")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('{"keys": [{"id": "a"}]}', "KeyError"),
        ('{"keys": [{"id": "a", "user": "u", "sha256": "00"}]}', "no SHA-256"),
        ('{"keys": [{"id": "a", "role": "root"}]}', "none of user, admin"),
        ('{"keys": [{"id": "a", "tier": "gold"}]}', "none of batch, default, interactive"),
        ('{"keys": [{"secret": "hidden"}]}', "unknown field 'secret'"),
        ("{hidden", "JSONDecodeError"),
    ],
)
def test_a_bad_file_of_hashes_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(ConfigurationError, match=problem) as caught:
        read_keys(tmp_path / "keys")
    assert "hidden" not in str(caught.value)


def test_a_file_that_changes_is_read_again_and_a_bad_one_changes_nothing(tmp_path: Path) -> None:
    path, now = tmp_path / "keys", [0.0]
    path.write_text("ann:k1\n")
    keys = KeyFile(path, clock=lambda: now[0])
    path.write_text("bob:key-2\n")
    assert keys.find(digest_of("key-2")) is None, "it is looked at once a second"
    now[0] += 2
    assert keys.find(digest_of("k1")) is None
    path.write_text("nonsense")
    now[0] += 2
    found = keys.find(digest_of("key-2"))
    assert found is not None
    assert found.user == "bob"


@pytest.mark.parametrize("field", ["expires_at", "revoked_at"])
def test_a_key_whose_time_is_over_is_refused_by_its_id(tmp_path: Path, field: str) -> None:
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=1)
    text, key = new_key("ann", **{field: past})
    write_keys(tmp_path / "keys", [key])
    with pytest.raises(AuthenticationError, match=f"{key.key_id} (has expired|was revoked)"):
        check(Authenticator(KeyFile(tmp_path / "keys"), BadAttempts()), text)


def test_the_operators_key_is_an_administrators_beside_any_others() -> None:
    keys = open_keys(None, digest_of("mine").hex())
    authenticator = Authenticator(keys, BadAttempts())
    assert check(authenticator, "mine").is_admin
    assert not check(authenticator, "other").is_admin


def test_who_guesses_has_to_wait_and_locks_nobody_out_who_was_right_before(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("ann:k1\nbob:k2\n")
    authenticator = Authenticator(KeyFile(tmp_path / "keys"), BadAttempts(burst=3, per_minute=1))
    check(authenticator, "k1")
    for guess in range(3):
        with pytest.raises(AuthenticationError):
            check(authenticator, f"guess-{guess}")
    for key in ("guess-4", "k2"):
        with pytest.raises(CapacityError, match="try again in") as caught:
            check(authenticator, key)
        assert caught.value.reason is Reason.TOO_MANY_ATTEMPTS
        assert caught.value.retry_after_seconds
    assert check(authenticator, "k1").user == "ann"
    assert check(authenticator, "k2", "ipv4:10.0.0.2:4").user == "bob"


def test_guesses_are_forgotten_with_time() -> None:
    attempts = BadAttempts(burst=2, per_minute=60)
    attempts.wrong("peer", now=0.0)
    attempts.wrong("peer", now=0.0)
    assert attempts.wait("peer", b"x", now=0.0) == pytest.approx(1.0)
    assert attempts.wait("peer", b"x", now=1.0) == 0.0


@pytest.mark.parametrize(
    ("requested", "allowed", "given"),
    [
        (0, Tier.INTERACTIVE, Tier.DEFAULT),
        (0, Tier.BATCH, Tier.BATCH),
        (3, Tier.DEFAULT, Tier.DEFAULT),
        (1, Tier.INTERACTIVE, Tier.BATCH),
        (3, Tier.INTERACTIVE, Tier.INTERACTIVE),
        (99, Tier.DEFAULT, Tier.DEFAULT),
    ],
)
def test_a_tier_is_what_was_asked_for_within_what_is_allowed(
    requested: int, allowed: Tier, given: Tier
) -> None:
    assert clamp(requested, allowed) is given


def test_terms_survive_being_written() -> None:
    terms = Terms(Tier.BATCH, 2.5, Limits(max_tokens=7, max_run_seconds=1.5))
    assert Terms.read(terms.written()) == terms
    assert Terms.read("") == Terms()


def test_of_two_bounds_the_smaller_holds() -> None:
    both = Limits(max_tokens=5, max_saved_bytes=9).within(Limits(max_tokens=7, max_kept_bytes=3))
    assert both == Limits(max_tokens=5, max_saved_bytes=9, max_kept_bytes=3)


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
        ({"operator_key_sha256": "12"}, "--operator-key-sha256"),
        ({"limits": Limits(max_run_seconds=0.0)}, "--max-run-seconds"),
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
