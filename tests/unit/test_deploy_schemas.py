"""The files of deploy/ have no field that their formats lack, require, or have as another type."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SCHEMAS = yaml.safe_load((ROOT / "tests" / "assets" / "deploy_schemas.yaml").read_text())
PATTERNS = {
    "quantity": re.compile(r"\d+(\.\d+)?([numkMGTPE]|[KMGTPE]i)?"),
    "duration": re.compile(r"(\d+(ms|s|m|h|d|w|y))+"),
}


class StrictLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which PyYAML takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if doubled := {key for key in keys if keys.count(key) > 1}:
            raise yaml.constructor.ConstructorError(None, None, f"twice: {doubled}", node.start_mark)
        return super().construct_mapping(node, deep)


def is_of(kind: str, value: Any) -> bool:
    """Whether a value is of a type, or one of several values, that a schema names."""
    is_integer, is_string = type(value) is int, type(value) is str
    types = {
        "string": is_string,
        "integer": is_integer,
        "number": is_integer or type(value) is float,
        "boolean": type(value) is bool,
        "nothing": value is None,
        "integer or string": is_integer or is_string,
        "quantity": is_integer or is_string and PATTERNS["quantity"].fullmatch(value) is not None,
        "duration": is_string and PATTERNS["duration"].fullmatch(value) is not None,
    }
    return types[kind] if kind in types else value in kind.split(" | ")


def misfits(schema: Any, value: Any, path: str = "") -> list[str]:
    """What of a document its schema lacks, requires, or has as another type (tests/assets/deploy_schemas.yaml)."""
    if isinstance(schema, str):
        return [] if is_of(schema, value) else [f"{path}: {value!r} is no {schema}"]
    if isinstance(schema, int):
        return [] if value == schema and type(value) is int else [f"{path}: {value!r} is not {schema}"]
    if isinstance(schema, list):
        if not isinstance(value, list):
            return [f"{path}: no list"]
        return [reason for i, item in enumerate(value) for reason in misfits(schema[0], item, f"{path}[{i}]")]
    if not isinstance(value, dict):
        return [f"{path}: no object"]
    if schema.keys() == {"any"}:
        return [reason for key, item in value.items() for reason in misfits(schema["any"], item, f"{path}.{key}")]
    (first, *_) = schema
    if first.startswith("by "):
        name = first.removeprefix("by ")
        found = value.get(name)
        if not isinstance(found, str) or found not in schema[first]:
            return [f"{path}.{name}: {found!r} is none of {', '.join(schema[first])}"]
        return misfits({f"{name}!": "string", **schema[first][found]}, value, path)
    fields = {name.rstrip("!"): inner for name, inner in schema.items()}
    missing = [f"{path}.{name[:-1]}: missing" for name in schema if name.endswith("!") and name[:-1] not in value]
    for name, item in value.items():
        missing += misfits(fields[name], item, f"{path}.{name}") if name in fields else [f"{path}.{name}: unknown"]
    return missing


def misfits_of(name: str, text: str) -> list[str]:
    """What is wrong with the text of a file of deploy/, by its schema."""
    documents = list(yaml.load_all(text, StrictLoader))
    assert documents and all(documents)
    return [reason for document in documents for reason in misfits(SCHEMAS[name], document)]


def test_every_file_has_a_schema():
    files = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()}
    assert files - {"Dockerfile"} == set(SCHEMAS)


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_files_fit_their_formats(name: str):
    assert misfits_of(name, (DEPLOY / name).read_text()) == []


@pytest.mark.parametrize(
    ("name", "old", "new", "reason"),
    [
        ("compose.yaml", "retries: 3", "retry: 3", ".healthcheck.retry: unknown"),
        ("compose.yaml", "interval: 10s", "interval: 10", "interval: 10 is no duration"),
        ("compose.yaml", "capabilities: [gpu]", "options: {}", "devices[0].capabilities: missing"),
        ("compose.yaml", 'REPORTING_ENABLED: "false"', "REPORTING_ENABLED: false", "False is no string"),
        ("compose.yaml", "restart: unless-stopped", "restart: no", "False is no no | always"),
        ("compose.yaml", "\nvolumes:\n", "\nvolume:\n", ".volume: unknown"),
        ("kubernetes.yaml", "kind: Service", "kind: Servce", ".kind: 'Servce' is none of"),
        ("kubernetes.yaml", "apiVersion: apps/v1", "apiVersion: apps/v1beta1", "'apps/v1beta1' is no apps/v1"),
        ("kubernetes.yaml", "replicas: 1", 'replicas: "1"', ".spec.replicas: '1' is no integer"),
        ("kubernetes.yaml", "failureThreshold: 180", "failureTreshold: 180", "failureTreshold: unknown"),
        ("kubernetes.yaml", "{claimName: vllm-models}", "{name: vllm-models}", "claimName: missing"),
        ("kubernetes.yaml", "accessModes: [ReadWriteOnce]", "accessModes: ReadWriteOnce", "accessModes: no list"),
        ("kubernetes.yaml", "storage: 200Gi", "storage: 200GiB", "storage: '200GiB' is no quantity"),
        ("kubernetes.yaml", "port: 8000, targetPort", "targetPort", ".spec.ports[0].port: missing"),
        ("kuberay.yaml", "groupName:", "name:", ".spec.workerGroupSpecs[0].groupName: missing"),
        ("kuberay.yaml", "spec:\n  headGroupSpec:", "spec:\n  workers: 2\n  headGroupSpec:", ".spec.workers: unknown"),
        ("kuberay.yaml", 'num-gpus: "0"', "num-gpus: 0", "num-gpus: 0 is no string"),
        ("kuberay.yaml", "memory: 128Gi", "memory: 128 GB", "memory: '128 GB' is no quantity"),
        ("prometheus/prometheus.yml", "scrape_interval: 10s", "scrape_interval: ten", "'ten' is no duration"),
        ("prometheus/prometheus.yml", "job_name: vllm", "name: vllm", "scrape_configs[0].job_name: missing"),
        ("prometheus/alerts.yml", "expr: vllm_ssd:drafter_connected == 0", "expr: 0", "expr: 0 is no string"),
        ("prometheus/alerts.yml", "for: 5m", "for: 5 minutes", "'5 minutes' is no duration"),
        ("grafana/provisioning/datasources/prometheus.yml", "isDefault: true", "default: true", ".default: unknown"),
        ("grafana/provisioning/dashboards/ssd.yml", "path:", "folder:", "options.path: missing"),
        ("grafana/ssd.json", '"type": "stat"', '"type": "singlestat"', "'singlestat' is none of stat, timeseries"),
        ("grafana/ssd.json", '"schemaVersion": 39', '"schemaVersion": "39"', "'39' is no integer"),
        ("grafana/ssd.json", '"placement": "bottom"', '"placement": "below"', "'below' is no bottom | right"),
        ("grafana/ssd.json", '"legendFormat": "hits"', '"legend": "hits"', ".targets[0].legend: unknown"),
    ],
)
def test_what_a_format_does_not_have_is_noticed(name: str, old: str, new: str, reason: str):
    text = (DEPLOY / name).read_text()
    assert old in text
    assert [found for found in misfits_of(name, text.replace(old, new)) if reason in found]


def test_a_key_that_is_there_twice_is_noticed():
    text = (DEPLOY / "compose.yaml").read_text().replace("    ipc: host\n", "    ipc: host\n    ipc: private\n")
    with pytest.raises(yaml.YAMLError, match="twice: {'ipc'}"):
        misfits_of("compose.yaml", text)
