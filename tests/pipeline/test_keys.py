"""Keys: unique, printable, and reversible to the path they came from."""

import os

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pipeline.keys import escape, member_part, path_of, printable, unescape

# What a file system or a tar can hand out: any bytes but NUL, undecodable ones as surrogates.
names = st.one_of(
    st.binary(min_size=1, max_size=30).map(os.fsdecode),
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30),
)
members = st.lists(st.one_of(st.sampled_from(["a", "a;2", "a;3", "a%3B2", "b#", "b"]), names))


@given(names)
@example("100%.jpg")
@example("%23#%")
@example(os.fsdecode(b"latin1-\xe9.jpg"))
def test_unescape_undoes_escape(name):
    assert unescape(escape(name)) == name


@given(names)
def test_an_escaped_part_is_printable_and_holds_no_hash(name):
    part = escape(name)

    assert "#" not in part
    assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in part)
    part.encode()  # no surrogate is left: Parquet and JSON take it


@given(names, names)
def test_two_names_never_share_a_key(one, other):
    assert (escape(one) == escape(other)) == (one == other)


@given(names, members)
def test_the_first_hash_of_a_key_separates_path_and_member(path, inside):
    seen: dict[str, int] = {}
    for member in inside:
        assert path_of(f"{escape(path)}#{member_part(member, seen)}") == path


@given(members)
@example(["a", "a", "a;2", "a;2", "a%3B2"])
@example(["a;2", "a", "a"])
def test_repeated_members_get_numbers_that_collide_with_no_name(inside):
    seen: dict[str, int] = {}
    parts = [member_part(name, seen) for name in inside]

    assert len(set(parts)) == len(parts)


def test_the_second_of_a_name_gets_2_and_the_first_stays_as_it_is():
    seen: dict[str, int] = {}

    assert [member_part(n, seen) for n in ("a.jpg", "a.jpg", "b.jpg", "a.jpg")] == [
        "a.jpg", "a.jpg;2", "b.jpg", "a.jpg;3",
    ]  # fmt: skip


def test_a_name_that_ends_like_a_number_is_escaped_and_comes_back():
    part = member_part("a.jpg;2", {})

    assert part == "a.jpg%3B2"
    assert unescape(part) == "a.jpg;2"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("a#b", "a%23b"),
        ("50%", "50%25"),
        ("new\nline", "new%0Aline"),
        ("ünï/日本.jpg", "ünï/日本.jpg"),
        (os.fsdecode(b"\xff"), "%FF"),
        ("\u2028", "%E2%80%A8"),
    ],
)
def test_only_what_must_be_is_escaped(name, part):
    assert escape(name) == part


@given(st.text(), st.integers(1, 50))
def test_text_for_a_log_line_is_one_short_line(text, limit):
    clean = printable(text, limit)

    assert len(clean) <= limit
    assert clean.isprintable()
