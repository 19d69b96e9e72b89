"""Personal data: what is masked, and what only looks like it."""

from __future__ import annotations

import pytest

from qwen2.data.personal import iban, luhn, mask, resident


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("Write to jane.doe+news@mail.acme.co.uk.", "Write to <email>."),
        ("From 8.8.8.8 and 2001:4860:4860::8888, port 53", "From <ip> and <ip>, port 53"),
        ("Card 4111 1111 1111 1111 or 5500-0055-5555-5559.", "Card <card> or <card>."),
        ("IBAN DE89 3704 0044 0532 0130 00, GB82WEST12345698765432", "IBAN <iban>, <iban>"),
        ("Call +49 30 901820-11, (212) 555-0147 or 212-555-0147", "Call <phone>, <phone> or <phone>"),
        ("SSN 078-05-1120", "SSN <id>"),
        ("\u8eab\u4efd\u8bc1 11010519491231002X", "\u8eab\u4efd\u8bc1 <id>"),
    ],
)
def test_what_is_masked(text: str, masked: str) -> None:
    assert mask(text)[0] == masked
    assert mask(masked)[0] == masked


@pytest.mark.parametrize(
    "text",
    [
        "Version 1.2.3.4.5 of 10.0.0.1 and 127.0.0.1, 192.168.1.10",
        "me@example.com, root@localhost, a@b",
        "Card 4111 1111 1111 1112, order 1234567890123456",  # wrong check digits
        "IBAN DE89 3704 0044 0532 0130 01",
        "From 1914-1918 to 2026-11-29, at 12:30:45, 3.14159265358979",
        "Numbers 1 000 000 and 100,000,000.25; pages 12-19; ISBN 978-3-16",
        "std::vector<int> a::b::c 10:20:30",
        "11010519491231002 and 110105194912310021",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert mask(text)[0] == text


def test_counts_and_checks() -> None:
    assert mask("a@acme.org, b@acme.org, 8.8.4.4")[1] == {"email": 2, "ip": 1}
    assert luhn("4111111111111111") != luhn("4111111111111112")
    assert iban("GB82 WEST 1234 5698 7654 32")
    assert not iban("GB82 WEST 1234 5698 7654 33")
    assert resident("11010519491231002X")
    assert not resident("110105194912310021")
