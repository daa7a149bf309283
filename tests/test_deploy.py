"""The files of `deploy/` say what the program understands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from server.kit import ScriptedBackend

from pace.cli import _parse
from pace.server.service import Service

DEPLOY = Path(__file__).resolve().parents[1] / "deploy"

pytestmark = pytest.mark.skipif(not DEPLOY.is_dir(), reason="needs the source checkout")


def section(text: str, name: str) -> dict[str, str]:
    """The settings of a section of a unit."""
    lines = text.partition(f"[{name}]\n")[2].partition("\n[")[0].splitlines()
    return dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))


def options_of(command: list[str]) -> Any:
    program, *args = command
    assert program.endswith("/pace")
    return _parse(args)


def test_the_unit_starts_the_server_and_lets_streams_end() -> None:
    service = section((DEPLOY / "pace.service").read_text(), "Service")
    options = options_of(shlex.split(service["ExecStart"]))
    assert options.model == "${PACE_MODEL}" and options.host == "127.0.0.1"
    assert options.api_key_file == "${CREDENTIALS_DIRECTORY}/keys"
    assert service["LoadCredential"].startswith("keys:")
    assert float(service["TimeoutStopSec"]) >= options.shutdown_timeout + 5
    assert service["KillMode"] == "mixed"  # the front-end ends its engines itself
    assert service["NoNewPrivileges"] == service["DynamicUser"] == "yes"


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    systemd = shutil.which("systemd-analyze")
    if systemd is None:
        pytest.skip("needs systemd-analyze")
    unit = (DEPLOY / "pace.service").read_text().replace("/opt/pace/bin/pace", "/bin/true")
    (tmp_path / "pace.service").write_text(unit)
    done = subprocess.run(
        [systemd, "verify", "--man=no", str(tmp_path / "pace.service")],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "pace.service" in line]
    assert not complaints


def test_the_image_starts_the_server_as_nobody_and_asks_for_its_health() -> None:
    text = (DEPLOY / "Dockerfile").read_text().replace("\\\n", " ")
    told: dict[str, str] = {}
    for line in text.splitlines():
        name, _, rest = line.partition(" ")
        if name.isupper():
            told[name] = rest  # the last stage's, where there are several
    entry, command = json.loads(told["ENTRYPOINT"]), json.loads(told["CMD"])
    options = options_of([*entry, *command])
    assert options.model == "/model" and options.host == "0.0.0.0"
    assert str(options.port) == told["EXPOSE"] and told["USER"] == "65534:65534"
    assert told["STOPSIGNAL"] == "SIGTERM"
    health = json.loads(told["HEALTHCHECK"].partition("CMD ")[2])
    assert f"http://127.0.0.1:{options.port}/health'" in health[2]
    compile(health[2], "healthcheck", "exec")
    extras = re.search(r"\[([a-z,]+)\]", told["RUN"])
    project = (DEPLOY.parent / "pyproject.toml").read_text()
    assert extras is not None and all(f"\n{extra} = [" in project for extra in extras[1].split(","))


def test_every_metric_of_the_dashboard_exists() -> None:
    """And every label that it groups by or names in a legend."""
    metrics = Service(ScriptedBackend(lambda job: []), ["m"]).metrics
    metrics.finished["stop"] += 1
    metrics.responses["/v1/completions", 200] += 1
    families = text_string_to_metric_families(metrics.text().decode())
    samples = {sample.name: sample for family in families for sample in family.samples}
    dashboard = json.loads((DEPLOY / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    names = set()
    for target in targets:
        used = set(re.findall(r"pace:[a-z0-9_]+", target["expr"]))
        assert used and used <= set(samples), target["expr"]
        names |= used
        labels = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        for grouped in re.findall(r"by \(([\w, ]+)\)", target["expr"]):
            labels |= set(grouped.split(", "))
        known = {label for name in used for label in samples[name].labels} | {"instance"}
        assert labels <= known, target["expr"]
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    own = {
        name
        for name in samples
        if name.startswith("pace:") and not name.endswith(("_sum", "_count", "_created"))
    }
    assert own - names == {"pace:cache_config_info", "pace:engine_repeated_steps_total"}  # all else is shown
