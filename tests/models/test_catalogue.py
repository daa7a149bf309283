"""docs/models.md says what the registry has, and families stay small."""

from __future__ import annotations

import pytest
from golden import families
from models import catalogue

from pace.models.registry import ARCHITECTURES, architectures


def test_the_page_is_not_stale() -> None:
    assert catalogue.PAGE.read_text() == catalogue.render(), "run python tests/models/catalogue.py"


def test_every_case_was_measured_within_its_tolerance() -> None:
    assert set(catalogue.SERVES) == set(architectures())
    measured = catalogue.measurements()["cases"]
    assert set(measured) == set(families.CASES), "run tests/golden/make.py"
    for name, row in measured.items():
        assert row["reference"] < 3e-5 and row["executor"] < row["tolerance"], name


@pytest.mark.parametrize("name", sorted(n for n, a in ARCHITECTURES.items() if not a.text))
def test_a_family_is_at_most_60_lines(name: str) -> None:
    assert catalogue.lines(ARCHITECTURES[name]) <= 60


def test_code_lines_leave_out_what_is_no_code() -> None:
    text = '"""Doc."""\n\n# note\nx = 1  # one\n\ndef f():\n    """Doc."""\n    return (\n        2\n    )\n'
    assert catalogue.code_lines(text) == {4, 6, 8, 9, 10}
