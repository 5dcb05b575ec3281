"""WEBHOOKS and WEBHOOK_URL: endpoints, read and checked; no secret is in a fault."""

from __future__ import annotations

import re

import pytest

from process.webhooks import parse_webhooks
from settings import SettingsError, load
from tests.servers import ROOT
from tests.test_webhooks import NEW, OLD
from webhooks.__main__ import wants

SHOP = f'[shop]\nurl = "https://shop.example/secret"\nsecrets = ["{NEW}"]\n'
# fmt: off
WRONG = {
    "WEBHOOKS: shop: url must be a URL without a login":
        SHOP.replace("https://", "http://") + SHOP.replace("https://", "https://a:secret@").replace("shop]", "b]"),
    "WEBHOOKS: shop: each of secrets must be whsec_ and 24 to 64 bytes": SHOP.replace(NEW, "whsec_secret"),
    "WEBHOOKS: shop: secrets: tuple should have at least 1 item": SHOP.replace(f'"{NEW}"', ""),
    "WEBHOOKS: shop: evnts: extra inputs are not permitted": f"{SHOP}evnts = []\n",
    "WEBHOOKS: each entry must be a table with a name of 1 to 32 letters": SHOP.replace("shop]", "webhook]"),
    "WEBHOOKS: must be TOML": "secret",
}
# fmt: on


@pytest.mark.parametrize("fault", WRONG)
def test_what_is_wrong_is_said_without_a_secret(fault: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(from_file={}, webhooks=WRONG[fault])
    assert str(caught.value).startswith(fault)
    assert "secret" not in str(caught.value).replace("of secrets", "").replace("secrets:", "")


def test_several_endpoints_are_in_the_order_of_their_text() -> None:
    shop, audit = parse_webhooks(f'{SHOP}{SHOP.replace("shop]", "audit]")}events = ["email.failed"]\nprivate = true\n')
    assert (shop.name, shop.host, shop.private, len(shop.keys)) == ("shop", "shop.example", False, 1)
    assert wants(shop).split()[:2] == ["shop.example", "email.sent"]
    assert (audit.name, audit.private, wants(audit)) == ("audit", True, "shop.example email.failed")
    with pytest.raises(SettingsError, match="audit: events must be some of"):
        wants(audit.model_copy(update={"events": ("email.snet",)}))


def test_the_endpoint_of_webhook_url_is_one_of_its_own() -> None:
    given = {"webhook_url": "https://shop.example/secret", "webhook_secret": f"{NEW}, {OLD}"}
    [only] = load("webhook_url", from_file={}, **given).all_webhooks
    assert (only.name, only.host, len(only.keys)) == ("webhook", "shop.example", 2)
    for wrong, fault in (
        ({"webhook_secret": "whsec_x"}, "WEBHOOK_SECRET: must be whsec_"),
        ({"webhook_secret": ""}, "WEBHOOK_SECRET is not set: it must be whsec_"),
        ({"webhook_url": "http://shop.example/secret"}, "WEBHOOK_URL must be a URL without a login"),
        ({"webhook_url": ""}, "WEBHOOK_URL is not set"),
        ({"webhooks": SHOP}, "WEBHOOK_URL and WEBHOOKS both name an endpoint"),
    ):
        with pytest.raises(SettingsError, match=fault):
            load("webhook_url", from_file={}, **(given | wrong))


def test_the_example_in_the_docs_is_right() -> None:
    text = (ROOT / "docs" / "webhooks.md").read_text().partition("```toml\n")[2].partition("```")[0]
    endpoints = parse_webhooks(re.sub("whsec_[a-z.]+", NEW, text))
    assert [(one.name, len(one.keys), one.private) for one in endpoints] == [("shop", 1, False), ("audit", 2, True)]
    assert all(map(wants, endpoints))
