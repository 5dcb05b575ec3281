"""What REDIS_URL may say, and what is said of one that cannot work."""

from __future__ import annotations

import pytest

from process.redis_url import Place, RedisUrl
from settings import Settings

TWO = (Place("a", 26379), Place("::1", 7))


@pytest.mark.parametrize(
    ("url", "plain", "sentinels"),
    [
        ("redis://:x@h:1/2?a=b", "redis://:x@h:1/2?a=b", None),
        ("redis://", "redis://", None),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1", None),
        ("redis+sentinel://a,[::1]:7/name", "redis://primary/0", (TWO, "name", None, None, False)),
        ("redis+sentinel://a, [::1]:7,A:26379/name", "redis://primary/0", (TWO, "name", None, None, False)),
        (
            "rediss+sentinel://u:p%40%2F@a:26379,[::1]:7/m/3?sentinel_password=%26%2Fx&health_check_interval=5",
            "rediss://u:p%40%2F@primary/3?health_check_interval=5",
            (TWO, "m", None, "&/x", True),
        ),
        (
            "redis+sentinel://:p@a,[::1]:7/m/0?sentinel_username=s&sentinel_password=w",
            "redis://:p@primary/0",
            (TWO, "m", "s", "w", False),
        ),
    ],
)
def test_an_url_is_one_address_or_several_sentinels(url: str, plain: str, sentinels: object) -> None:
    assert RedisUrl.parse(url) == (plain, sentinels)


@pytest.mark.parametrize(
    ("url", "must"),
    [
        ("http://secret@h", "must start with redis://"),
        ("redis", "must start with"),
        ("redis+sentinel://", "must name the Sentinels"),
        ("redis://:sec/ret@h:x/0", "must be a URL"),
        ("redis+sentinel://:secret@a:x/m", "must be a URL"),
        ("redis+sentinel://:sec#ret@a/m", "must be a URL"),
        ("redis+sentinel://:secret@a,b", "must name the Sentinels"),
        ("redis+sentinel://:secret@a,,b/m", "must name the Sentinels"),
        ("redis+sentinel://:secret@a,b/m/x", "must name the Sentinels"),
    ],
)
def test_what_cannot_be_read_is_told_without_the_password(url: str, must: str) -> None:
    with pytest.raises(ValueError, match=must) as raised:
        Settings(redis_url=url)
    assert "secret" not in str(raised.value).replace(url, "")


@pytest.mark.parametrize(
    ("url", "with_authority"),
    [
        ("redis://h/0", "redis://h/0"),
        ("rediss://h/0", "rediss://h/0?ssl_ca_certs=FILE"),
        ("rediss://h/0?db=1", "rediss://h/0?db=1&ssl_ca_certs=FILE"),
        ("rediss+sentinel://h/m?ssl_ca_certs=mine", "rediss+sentinel://h/m?ssl_ca_certs=mine"),
    ],
)
def test_the_authority_is_for_tls_alone(url: str, with_authority: str) -> None:
    assert Settings(redis_url=url, redis_ca_file=__file__).redis == with_authority.replace("FILE", __file__)
