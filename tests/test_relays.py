"""RELAYS: several relays by name, as TOML."""

from __future__ import annotations

import pytest

from process.relays import parse_relays
from settings import SettingsError, load
from smtp.relay import Relay

FIRST = '[first]\nhost = "smtp.example.com"\n'
UPSTREAM = '[second]\nkind = "resend"\nurl = "https://api.example"\napi_key = "k"\n'
TWO = f'{FIRST}rate = "14/s"\ndomains = ["acme.example"]\n{UPSTREAM}'
OAUTH = '[first.oauth]\nprovider = "google"\nclient_id = "a"\nrefresh_token = "secret"\n'
# fmt: off
WRONG = {
    "first: host must be set for a relay of kind smtp": "[first]\n",
    "first: url must be set for a relay of kind resend; api_key must be set": '[first]\nkind = "resend"\n',
    "first: api_key is not for a relay of kind smtp": f'{FIRST}api_key = "secret"\n',
    "first: username and password go together": f'{FIRST}username = "ada"\n',
    "first: oauth: one of provider and token_url":
        f'{FIRST}username = "a"\n[first.oauth]\nclient_id = "secret"\nrefresh_token = "secret"\n',
    "first: oauth.client_id: field required":
        f'{FIRST}username = "a"\n[first.oauth]\nprovider = "google"\nrefresh_token = "secret"\n',
    "first: only one of password and oauth may be set": f'{FIRST}username = "a"\npassword = "secret"\n{OAUTH}',
    "first: security none would send the password in clear":
        f'{FIRST}security = "none"\nusername = "a"\npassword = "secret"\n',
    "first: url must be a URL that begins with https://":
        '[first]\nkind = "resend"\nurl = "http://a.example"\napi_key = "secret"\n',
    "first: domains must be domains in ASCII and small letters": f'{FIRST}domains = ["Acme.example"]\n',
    "first: port: input should be less than or equal to 65535": f"{FIRST}port = 70000\n",
    "first: rate: must be a rate per second": f'{FIRST}rate = "14"\n',
    "first: hots: extra inputs are not permitted": f'{FIRST}hots = "secret"\n',
    "each entry must be a table with a name of 1 to 32 letters": '[relay]\nhost = "a.example"\n',
    "must be TOML": "password = secret\n",
}
# fmt: on


def test_relays_are_in_the_order_of_their_text() -> None:
    first, second = parse_relays(TWO)
    assert (first.name, first.kind, first.port, str(first.rate[0])) == ("first", "smtp", 587, "14/s")
    assert (second.name, second.kind, second.url) == ("second", "resend", "https://api.example")
    assert [first.serves(one) for one in ("acme.example", "a.acme.example")] == [True, False]
    assert second.serves("any.example")
    [by_token] = parse_relays(f'{FIRST}username = "a"\n{OAUTH}')
    assert by_token.oauth
    assert by_token.oauth.own_refresh_token == "secret"
    assert (tokens := Relay.of(load(from_file={}), by_token).tokens)
    assert tokens.keys == ["relay:first:token", "relay:first:renewing"]


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_said_without_a_secret(fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(from_file={}, relays=WRONG[fault])
    assert [one.startswith(f"RELAYS: {fault}") for one in caught.value.faults] == [True], caught.value.faults
    assert "secret" not in str(caught.value)


def test_the_relay_of_smtp_host_is_one_of_its_own() -> None:
    [only] = load(from_file={}, smtp_host="a.example", smtp_port=465, smtp_rate="9/s").all_relays
    assert (only.name, only.host, only.security, str(only.rate[0])) == ("relay", "a.example", "tls", "9/s")
    assert load(from_file={}).all_relays == ()
    assert len(load("smtp_host", from_file={}, relays=TWO).all_relays) == 2
    with pytest.raises(SettingsError, match="SMTP_HOST and RELAYS both name a relay"):
        load(from_file={}, smtp_host="a.example", relays=TWO)
