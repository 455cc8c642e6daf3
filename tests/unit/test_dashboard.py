"""The dashboard and the alert rules are well formed, and every metric in them exists."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_ssd.link.protocol import DrafterStats
from vllm_ssd.target.metrics import Metrics

DEPLOY = Path(__file__).parents[2] / "deploy"
METRIC = re.compile(r"\bvllm(?:_ssd)?:\w+")
OF_VLLM = {"vllm:generation_tokens": "_total", "vllm:num_requests_running": ""}
"""vLLM's metrics that are used, and what its exposition adds to their names."""
LABELS = {"engine", "job", "instance", "batch", "position"}


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "ssd.json").read_text())


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Samples that a server exposes: ours from our registry, vLLM's as its source has them."""
    metrics = Metrics(3, logging.getLogger("test_dashboard"))
    metrics.accepted([1], [1])
    metrics.drafter(DrafterStats(10, 30, 4.0, 100, 2), generation=1)
    ours = {sample.name for family in metrics.collect() for sample in family.samples}
    import vllm.v1.metrics

    source = "".join(path.read_text() for path in Path(vllm.v1.metrics.__path__[0]).glob("*.py"))
    theirs = {name + suffix for name, suffix in OF_VLLM.items() if f'"{name}"' in source}
    assert len(theirs) == len(OF_VLLM), "vLLM has renamed a metric"
    return ours | theirs


def expressions(dashboard: dict[str, Any]) -> list[str]:
    return [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]


def test_the_dashboard_has_what_grafana_wants(dashboard):
    assert dashboard["schemaVersion"] >= 36 and dashboard["uid"] and dashboard["title"]
    assert {"from", "to"} == set(dashboard["time"])
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) > 5
    for panel in dashboard["panels"]:
        assert panel["type"] in ("stat", "timeseries") and panel["title"] and panel["description"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert {"defaults", "overrides"} == set(panel["fieldConfig"]) and isinstance(panel["options"], dict)
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        for target in panel["targets"]:
            assert target["datasource"] == panel["datasource"] and target["expr"] and target["legendFormat"]


def test_no_two_panels_overlap(dashboard):
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert set(at) == {"x", "y", "w", "h"} and at["w"] > 0 and at["h"] > 0
        assert 0 <= at["x"] and at["x"] + at["w"] <= 24 and at["y"] >= 0
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own


def test_variables_are_declared(dashboard):
    declared = {variable["name"] for variable in dashboard["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(dashboard["panels"])))
    assert used - {"__rate_interval", "__all"} <= declared and "datasource" in declared


def test_every_metric_exists(dashboard, rules, names):
    variables = [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    texts = expressions(dashboard) + [rule["expr"] for rule in rules] + variables
    used = {name for text in texts for name in METRIC.findall(text)}
    assert used <= names, used - names
    assert len([name for name in used if name.startswith("vllm_ssd:")]) > 15


def test_counters_are_read_as_rates(dashboard, rules):
    for text in expressions(dashboard) + [rule["expr"] for rule in rules]:
        for counter in re.finditer(r"vllm(?:_ssd)?:\w+_total", text):
            assert re.search(r"(rate|increase)\($", text[: counter.start()]), text
        assert text.count("(") == text.count(")") and text.count("{") == text.count("}")
        assert set(re.findall(r"by \((\w+)(?:, (\w+))?\)", text)) <= {(a, b) for a in LABELS for b in LABELS | {""}}


def test_the_rules_are_prometheus_s(rules):
    assert len({rule["alert"] for rule in rules}) == len(rules) > 3
    for rule in rules:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert re.fullmatch(r"\d+[smhd]", rule.get("for", "1m"))
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description"}


def test_a_metric_that_does_not_exist_is_found(dashboard, rules, names):
    with pytest.raises(AssertionError, match="vllm_ssd:gone"):
        test_every_metric_exists(dashboard, [{"expr": "vllm_ssd:gone_total"}], names)
