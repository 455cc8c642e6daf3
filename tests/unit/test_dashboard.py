"""The dashboard and the alert rules are well formed, and every metric in them exists."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filled_metrics import filled_metrics
from promql import OF_PROMETHEUS, Parser, PromQLError

from vllm_ssd.link.metrics_socket import WorkersCollector

DEPLOY = Path(__file__).parents[2] / "deploy"
OF_VLLM = {"vllm:generation_tokens": "_total", "vllm:num_requests_running": ""}
"""vLLM's metrics that are used, and what its exposition adds to their names."""
OF_GRAFANA = {"__rate_interval"}
"""Variables that nobody declares."""


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    return json.loads((DEPLOY / "grafana" / "ssd.json").read_text())


@pytest.fixture(scope="module")
def rules() -> list[dict[str, Any]]:
    (group,) = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())["groups"]
    return group["rules"]


@pytest.fixture(scope="module")
def metrics() -> dict[str, Collection[str]]:
    """Labels by name of the samples on a server's page: ours as it collects them, vLLM's as its source has them."""
    worker = filled_metrics()
    name = "test-dashboard"
    worker.listen(name, 0)
    try:
        ours = {s.name: set(s.labels) for family in WorkersCollector(name, [0]).collect() for s in family.samples}
    finally:
        worker.close()
    import vllm.v1.metrics

    source = "".join(path.read_text() for path in Path(vllm.v1.metrics.__path__[0]).glob("*.py"))
    assert 'labelnames = ["model_name", "engine"]' in source, "vLLM has changed its labels"
    found = {f"{name}{suffix}": {"model_name", "engine"} for name, suffix in OF_VLLM.items() if f'"{name}"' in source}
    assert len(found) == len(OF_VLLM), "vLLM has renamed a metric"
    return {**ours, **found}


def targets(dashboard: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for panel in dashboard["panels"]:
        yield from panel["targets"]


def variables(dashboard: dict[str, Any]) -> set[str]:
    return {variable["name"] for variable in dashboard["templating"]["list"]} | OF_GRAFANA


def test_the_dashboard_has_what_grafana_wants(dashboard):
    assert dashboard["schemaVersion"] >= 36
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids) > 5
    for panel in dashboard["panels"]:
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(set(refs)) == len(refs)
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_no_two_panels_overlap(dashboard):
    cells: set[tuple[int, int]] = set()
    for panel in dashboard["panels"]:
        at = panel["gridPos"]
        assert at["w"] > 0 and at["h"] > 0
        assert 0 <= at["x"] and at["x"] + at["w"] <= 24 and at["y"] >= 0
        own = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not own & cells, panel["title"]
        cells |= own


def test_expressions_yield_what_their_legends_name(dashboard, metrics):
    """Series of a panel are told apart by every label but those of Prometheus."""
    for target in targets(dashboard):
        found = Parser(target["expr"], metrics, variables(dashboard)).parse()
        assert found.kind == "vector"
        named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
        assert named <= found.labels and found.labels - OF_PROMETHEUS <= named, target["expr"]


def test_all_of_a_panel_is_of_the_chosen_servers(dashboard):
    for target in targets(dashboard):
        selected = re.findall(r"vllm\w*:\w+(\{[^}]*\})?", target["expr"])
        assert set(selected) == {'{job=~"$job", engine=~"$engine"}'}, target["expr"]


def test_variables_ask_for_what_is_there(dashboard, metrics):
    queries = [v["query"]["query"] for v in dashboard["templating"]["list"] if v["type"] == "query"]
    assert len(queries) == 2
    for query in queries:
        Parser(query, metrics, variables(dashboard)).parse_label_values()


def test_most_metrics_are_shown(dashboard, rules, metrics):
    texts = [target["expr"] for target in targets(dashboard)] + [rule["expr"] for rule in rules]
    assert len([name for name in metrics if name.startswith("vllm_ssd:") and any(name in t for t in texts)]) > 15


def test_alerts_ask_for_what_is_there(rules, metrics):
    """They fire with labels that their texts name, and have no variables."""
    assert len({rule["alert"] for rule in rules}) == len(rules) > 3
    for rule in rules:
        found = Parser(rule["expr"], metrics).parse()
        texts = rule["annotations"]
        assert set(texts) == {"summary", "description"} and rule["labels"]["severity"] in (
            "info",
            "warning",
            "critical",
        )
        named = set(re.findall(r"\$labels\.(\w+)", " ".join(texts.values())))
        assert "instance" in named <= found.labels, rule["alert"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sum(rate(hits_total[5m])", "'the end' where '\\)' should be"),
        ("sum(rate(hits_total[5m])))", "'\\)' is left over"),
        ("sum(rate(hits_total{engine='0'}[5m]))", "is no PromQL"),
        ('rate(hits_total{engine="0"[5m])', "where ',' should be"),
        ("average(rate(hits_total[5m]))", r"average\(\) is not known"),
        ("rate(hits_total)", r"rate\(\) of what is no range"),
        ("rate(hits_total[5])", "'5' where a duration should be"),
        ("rate(pages[5m])", "no range of a counter"),
        ("hits_total[5m]", "the expression is a range"),
        ("sum(hits_total)", "sum is a counter"),
        ("hits_total > 5", "is a counter"),
        ("sum(rate(hit_total[5m]))", "nobody exposes hit_total"),
        ('pages{replica="0"}', "pages has no label replica"),
        ("sum by (drafter) (rate(hits_total[5m]))", r"sum\(\) gets has no label drafter"),
        ("sum(pages) by (position)", r"sum\(\) gets has no label position"),
        ("pages / rate(hits_total[5m])", "never matches"),
        ("sum by (engine) (pages) / sum(pages)", "never matches"),
        ("sum by (engine) (pages) / on() sum(pages)", "have the same set"),
        ("sum(pages) / on() group_left() sum by (engine) (pages)", "have the same set"),
        ("pages > 1 and on (drafter) rate(hits_total[5m]) > 0", "both sides of 'and' has no label drafter"),
        ("pages > 1 and 3", "of a scalar has no labels"),
        ("pages >", "'the end' where a name should be"),
        ('pages{engine=~"("}', "is no pattern"),
        ('pages{engine=~"$job"}', r"\$job is not declared"),
        ('pages{engine="$engine"}', "several values is a pattern"),
        ("rate(hits_total[$__interval])", r"\$__interval is not declared"),
    ],
)
def test_what_prometheus_would_refuse_or_never_find_is_refused(text: str, reason: str):
    with pytest.raises(PromQLError, match=reason):
        Parser(text, {"hits_total": {"engine"}, "pages": {"engine", "drafter"}}, {"engine"}).parse()


def test_operators_bind_as_in_prometheus():
    """The labels that are left over say which side was joined first."""
    known = {"a": {"x"}, "b": {"x", "y"}}
    found = Parser(
        'avg by (x) (b{y!~"0|1"}) * 2 + on(x) group_left() sum(b) by (x) > 1 or sum by (x) (a)', known
    ).parse()
    assert found.labels == {"x"}
    assert Parser("b > 1 and on (x) a > 0 or b < 3", known).parse().labels == {"x", "y"} | OF_PROMETHEUS
    assert Parser("(count(a) - 1) / max(b) <= min(a)", known).parse().labels == set()
