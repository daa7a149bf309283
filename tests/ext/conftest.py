"""The kernels under test: every runnable tier, and the scalar C table."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pace import ops


@pytest.fixture(params=[*ops.isas(), "reference"])
def kernel(request: pytest.FixtureRequest) -> Iterator[str]:
    """A tier, or "reference"; plans built in the test use it for all their operators (see `chosen`)."""
    if request.param == "reference":
        yield request.param
    else:
        with ops.using_isa(request.param):
            yield request.param
