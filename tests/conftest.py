"""Fixtures that many directories use: the ISA tier under test, a thread team, golden models ready to run."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable, Iterator

import pytest
from ext.kit import Packed, pack_model
from golden import tiny
from golden.harness import load
from hypothesis import settings

from pace import ops

# A background job of a shell is started with SIGINT ignored, Python then leaves it so, and the tests of Ctrl-C, here
# and in the processes that they start, would wait for a KeyboardInterrupt that never comes.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Hypothesis fails an example that took 0.2 s of wall time. No test of properties is one of speed, and a virtual machine
# stands still for longer.
settings.register_profile("pace", deadline=None)
settings.load_profile("pace")


@pytest.fixture(params=ops.isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every ISA tier that runs here, chosen for the length of the test."""
    with ops.using_isa(request.param):
        yield request.param


@pytest.fixture(scope="session")
def team() -> Iterator[ops.Team]:
    """Two threads, whatever the machine has: work is shared and stolen."""
    team = ops.Team(2)
    yield team
    team.close()


@pytest.fixture(scope="session")
def packed_model(tmp_path_factory: pytest.TempPathFactory, team: ops.Team) -> Callable[[str], Packed]:
    """packed_model(name): a golden case with its weights packed, once per session."""
    packed: dict[str, Packed] = {}

    def get(name: str) -> Packed:
        if name not in packed:
            directory = tiny.write(name, tmp_path_factory.mktemp("packed") / name)
            packed[name] = pack_model(team, load(directory, tiny.CASES[name].max_model_len))
        return packed[name]

    return get


@pytest.fixture(autouse=True)
def _pace_logger() -> Iterator[None]:
    """The command line configures the library's logger; no test sees what another's command set up."""
    logger = logging.getLogger("pace")
    state = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = state


@pytest.fixture(autouse=True)
def _interruptible() -> Iterator[None]:
    """Whatever ran in this process, Ctrl-C still raises KeyboardInterrupt behind it."""
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
