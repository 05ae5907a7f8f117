"""The lease of a server, without a server."""

from __future__ import annotations

import pytest

pytest.importorskip("msgspec", reason="msgspec is not installed: pip install 'vgen[server]'")

from vgen.engines.server.lease import LeaseBook, LeaseConflict


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def book(clock):
    return LeaseBook(clock)


def test_one_client_holds_it_and_each_new_holder_gets_the_next_epoch(book):
    assert book.free
    first = book.take("first", 60.0)
    assert (first["epoch"], first["ttl_seconds"], book.free) == (1, 60.0, False)
    with pytest.raises(LeaseConflict, match=r"'first' holds this server's lease \(epoch 1, taken 0 s ago\)"):
        book.take("second", 60.0)
    second = book.take("second", 60.0, takeover=True)
    assert second["epoch"] == 2
    assert second["token"] != first["token"]
    with pytest.raises(LeaseConflict, match="'second' holds"):
        book.renew(first["token"])
    book.release(second["token"])
    assert book.free
    assert book.describe() is None


@pytest.mark.parametrize("token", [None, "", "another"])
def test_no_other_token_is_as_good(book, token):
    book.take("first", 60.0)
    with pytest.raises(LeaseConflict), book.using(token):
        pass


@pytest.mark.fault(
    point="who may change a server",
    did="The holder stops renewing its lease",
    happens="It expires, and others may take it",
    within=20,
)
def test_it_expires_unless_it_is_renewed(book, clock):
    token = book.take("first", 10.0)["token"]
    clock.now += 9.0
    assert book.renew(token) == {"epoch": 1, "ttl_seconds": 10.0}
    clock.now += 9.0
    assert book.describe() == {"holder": "first", "epoch": 1, "held_seconds": 18.0, "expires_in_seconds": 1.0}
    clock.now += 1.0
    with pytest.raises(LeaseConflict, match="nobody holds"):
        book.renew(token)


def test_it_does_not_expire_during_a_call_which_renews_it_at_its_end(book, clock):
    token = book.take("first", 10.0)["token"]
    with book.using(token):
        clock.now += 1000.0
        assert not book.free
    clock.now += 9.0
    assert not book.free


def test_a_check_does_not_renew_it(book, clock):
    token = book.take("first", 10.0)["token"]
    clock.now += 9.0
    book.check(token)
    with pytest.raises(LeaseConflict):
        book.check("another")
    clock.now += 1.0
    with pytest.raises(LeaseConflict, match="nobody holds"):
        book.check(token)


def test_a_description_never_holds_the_token(book):
    token = book.take("first", 10.0)["token"]
    assert token not in str(book.describe())
