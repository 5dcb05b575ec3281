"""One machine for all tests here, of each Debian: booted bare, installed as README says, and given back to each test in
good order.

    bare       a machine booted from nothing, with a clone of this commit, and a relay beside it
    installed  the same after `bin/install`, with what was seen on the way
    server     the same after its one file was edited: it sends mail

Booting one needs root, and all of this takes minutes, so it is done only when it is asked for with REQUIRE_DEPLOY=1, as
CI does: REQUIRE_DEPLOY=1 bin/test tests/deploy (-k debian-13 takes that machine alone). `--durations=0` says how long
each step took: booting, installing and configuring are the setup of the first test that needs it. All tests of one
machine run in one process, beside all other tests (tests/side_by_side.py).
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from tests.deploy.machine import SUITES, booted, image, missing
from tests.deploy.server import Bare, Installed, Server
from tests.relay import Relay
from tests.servers import eventually

LOGIN, RELAY = ("AKIAEXAMPLE", "the relay's password is this"), "smtp.shop.internal"


@pytest.fixture(scope="session", params=SUITES)
def bare(request: pytest.FixtureRequest) -> Iterator[Bare]:
    if os.environ.get("REQUIRE_DEPLOY") != "1":
        pytest.skip("it boots a machine and takes minutes; REQUIRE_DEPLOY=1 asks for it")
    if reason := missing():
        pytest.fail(reason)
    with (
        image(SUITES[request.param]) as system,
        booted(system) as machine,
        Relay(LOGIN, "starttls", host=machine.network.host, name=RELAY, port=587) as relay,
    ):
        yield Bare(machine, relay)


@pytest.fixture(scope="session")
def installed(bare: Bare) -> Installed:
    return bare.install()


@pytest.fixture(scope="session")
def configured(installed: Installed) -> Server:
    return installed.configure()


@pytest.fixture
def server(configured: Server) -> Iterator[Server]:
    """Whole before the test and whole after it: what a test breaks it repairs, or it fails at once."""
    configured.relay.accepted.clear()
    yield configured
    eventually(configured.is_up, 60)
