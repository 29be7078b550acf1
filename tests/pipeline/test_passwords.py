"""A password in a URL is neither shown nor kept."""

import pytest

from pipeline.errors import RunRefused
from pipeline.passwords import refuse_passwords, without_password


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("https://me:pw@host/x", "https://***@host/x"),
        ("https://me:p/w@host/x", "https://***@host/x"),
        ("http://a:p@w@host", "http://***@host"),
        ("s3://k:p w@b/x", "s3://***@b/x"),
        ("s3://bucket/x", "s3://bucket/x"),
    ],
)
def test_no_part_of_it_is_shown(word, shown):
    assert without_password(f"cannot reach {word}: no") == f"cannot reach {shown}: no"


@pytest.mark.parametrize(
    "word", ["--mlflow=https://me:pw@host/x", "http://:pw@host", "ftp://a:p@h"]
)
def test_it_is_refused_among_what_others_may_read(word):
    with pytest.raises(RunRefused, match=r"train: .*holds a password") as refused:
        refuse_passwords(["data", word], "train")
    assert "pw" not in str(refused.value)


@pytest.mark.parametrize(
    "word", ["s3://bucket/a:b@c", "https://host:8265/x", "https://me@host/x", "a@b", "street@1:2"]
)
def test_what_only_looks_like_it_is_left_alone(word):
    refuse_passwords([word], "train")
