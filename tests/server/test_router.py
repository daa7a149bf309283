"""Which engine gets which job."""

from __future__ import annotations

from pathlib import Path

import pytest

from pace.errors import ConfigError
from pace.server.placement import nodes_of, place
from pace.server.router import Affinity, prefix_keys
from pace.server.wire import Chat, Frames, Job, Order, frame


def job(prompt: str | list[int] | None = None, chat: Chat | None = None, salt: str | None = None) -> Job:
    return Job(1, "r", prompt, chat, {}, 0, salt)


def test_a_longer_conversation_has_the_keys_of_its_beginning() -> None:
    turns = [{"role": "user", "content": str(i)} for i in range(4)]
    short, long = (prefix_keys(job(chat=Chat(turns[:n]))) for n in (2, 4))
    assert long[:2] == short and len(long) == 4
    assert prefix_keys(job(chat=Chat(turns[:2]), salt="s")) != short
    text, ids = "a" * 2000, list(range(2000))
    assert len(prefix_keys(job(text))) == 3 and prefix_keys(job(text + "b" * 600))[:3] == prefix_keys(
        job(text)
    )
    assert len(prefix_keys(job(ids))) == 3 and prefix_keys(job(ids[:1024])) == prefix_keys(job(ids))[:2]
    assert prefix_keys(job("short")) == []


def test_affinity_takes_the_longest_and_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pace.server.router.MAX_KEYS", 3)
    affinity = Affinity()
    affinity.note([1, 2], 0)
    affinity.note([1, 3], 1)
    assert affinity.find([1, 2]) == 0 and affinity.find([1, 9]) == 1 and affinity.find([8]) is None
    affinity.note([4], 1)
    assert affinity.find([2]) is None


def machine(root: Path, nodes: list[str], cores: list[int]) -> Path:
    for i, cpulist in enumerate(nodes):
        (root / "node" / f"node{i}").mkdir(parents=True)
        (root / "node" / f"node{i}" / "cpulist").write_text(cpulist + "\n")
    for cpu, core in enumerate(cores):
        topology = root / "cpu" / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "core_id").write_text(str(core))
        (topology / "physical_package_id").write_text("0")
    return root


def test_an_engine_per_node_and_no_core_twice(tmp_path: Path) -> None:
    system = machine(tmp_path, ["0-1,4-5", "2-3,6-7"], [0, 1, 2, 3, 0, 1, 2, 3])
    cpus = list(range(8))
    assert nodes_of(cpus, system) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert place(None, cpus, 4, system) == [([0, 1, 4, 5], 2), ([2, 3, 6, 7], 2)]
    assert place(1, cpus, 4, system) == [([], 4)]
    four = place(4, cpus, 4, system)
    assert [set(part) for part, _ in four] == [{0, 4}, {1, 5}, {2, 6}, {3, 7}]
    assert place(None, [2, 3], 2, system) == [([], 2)]  # of a part of the machine
    assert [n for _, n in place(2, cpus, 3, system)] == [1, 1]  # a quota of three
    with pytest.raises(ConfigError, match="data_parallel is 5"):
        place(5, cpus, 4, system)


def test_a_machine_that_says_nothing_is_one_node(tmp_path: Path) -> None:
    assert nodes_of([0, 1], tmp_path) == [[0, 1]]
    assert [part for part, _ in place(2, [0, 1], 2, tmp_path)] == [[0], [1]]


def test_messages_survive_every_cut() -> None:
    orders = [job("text"), job([1, 2]), job(chat=Chat([{"role": "user", "content": "hi"}]))]
    data = frame(orders[:2]) + frame(orders[2:])
    for size in (1, 3, 7, len(data)):
        frames, got = Frames(Order), []
        for at in range(0, len(data), size):
            got += frames.push(data[at : at + size])
        assert got == orders


@pytest.mark.parametrize(
    "data", [b"\xff\xff\xff\xff", frame([["nothing"]]), frame([1]), b"\x01\x00\x00\x00\xc1"]
)
def test_what_is_no_message_is_an_error(data: bytes) -> None:
    with pytest.raises(ValueError):
        Frames(Order).push(data)
