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
    ("language", "text", "masked"),
    [
        ("de", "Ruf 030 12345678 oder 0171/1234567 oder (0171) 1234567 an.", "Ruf <phone> oder <phone> oder <phone> an."),
        ("fr", "Le 06 12 34 56 78 ou 06.12.34.56.78", "Le <phone> ou <phone>"),
        ("en", "On 020 7946 0958, call 2125550147", "On <phone>, call <phone>"),
        ("zh", "\u6253 13812345678\u5427\uff0c138 1234 5678\u6216010-62345678", "\u6253 <phone>\u5427\uff0c<phone>\u6216<phone>"),
        ("ko", "010-1234-5678 02-2123-4567", "<phone> <phone>"),
        ("ja", "090-1234-5678\u304b03-1234-5678", "<phone>\u304b<phone>"),
        ("es", "Tel. 612 345 678, 91 123 45 67", "Tel. <phone>, <phone>"),
        ("ru", "8 (912) 345-67-89, 8 912 345-67-89", "<phone>, <phone>"),
        ("pt", "(11) 91234-5678", "<phone>"),
        ("it", "06 1234 5678", "<phone>"),
        ("ar", "\u0660\u0665\u0660 \u0661\u0662\u0663 \u0664\u0665\u0666\u0667", "<phone>"),  # Arabic digits
        ("fa", "\u06f0\u06f9\u06f1\u06f2 \u06f1\u06f2\u06f3 \u06f4\u06f5\u06f6\u06f7", "<phone>"),
        ("hi", "98765 43210, \u096f\u096e\u096d\u096c\u096b \u096a\u0969\u0968\u0967\u0966", "<phone>, <phone>"),
        ("ar", "\u0647: +\u0669\u0666\u0666 \u0665\u0660 \u0661\u0662\u0663 \u0664\u0665\u0666\u0667, \u0661", "\u0647: <phone>, \u0661"),
        ("de", "Ruf (0641) 306 1234 567 an, (089) 1234 5678 90", "Ruf <phone> an, <phone>"),  # more groups than the international form has
        ("bn", "01712-345678", "<phone>"),
        ("th", "081-234-5678", "<phone>"),
        ("tr", "0532 123 45 67", "<phone>"),
        ("de", "An j\u00fcrgen@m\u00fcller.de, j\u00fcrgen@mueller.de", "An <email>, <email>"),
        ("ru", "\u043f\u043e\u0447\u0442\u0430@\u043f\u0440\u0438\u043c\u0435\u0440.\u0440\u0444", "<email>"),
        (
            "zh",
            "\u53d1\u81f3zhang.wei@acme.cn\u8054\u7cfb\uff0c\u5f20\u4f1f@\u516c\u53f8.\u4e2d\u56fd",
            "\u53d1\u81f3<email>\u8054\u7cfb\uff0c<email>",
        ),
    ],
)
def test_what_is_masked_in_a_language(language: str, text: str, masked: str) -> None:
    assert mask(text, language)[0] == masked
    assert mask(masked, language)[0] == masked


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "See version 1.2.3.4, v8.8.8.8, chapter 8.8.8.8, Section 9.9.9.9 and build (8.8.4.4)"),
        ("de", "Kapitel 8.8.8.8"),
        ("zh", "\u7248\u672c 8.8.8.8\uff0c\u7b2c1.2.3.4\u7ae0"),
        ("de", "1914-1918, am 05.12.2024 12:30, 12.05.2024 12345678, 0.123456789, 1.234.567.890, 0 1 2 3 4 5 6 7 8 9, 01067 Dresden"),
        ("it", "Page text/scalc/01/02170000.xhp, shared/02/11140000.xhp and 03020410.xhp, 03020410, (-32768 - 32767), (32768 - 32767)"),
        ("vi", "(48 + 500) +20.000 = 44.000"),
        ("fr", "612 345 678 habitants, 1 234 567 890 francs"),
        ("pl", "501 234 567 osob"),
        ("en", "2125550147, 1700000000, 2,125,550,147, 0x12345678, 2000-2008, 212.555.014.7"),
        ("ko", "1592-1598"),
        ("ja", "2024-05-12, 1999-2004"),
        ("zh", "2024-05-12 11:00, 12345678901"),
    ],
)
def test_what_only_looks_like_it_in_a_language(language: str, text: str) -> None:
    assert mask(text, language)[0] == text


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
