"""The image keeps the rules of its linter, and the files of deploy/ fit each other and the plugin.

What their formats ask of them is in `test_deploy_schemas.py`.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from vllm_ssd import __version__
from vllm_ssd.compat.version import SUPPORTED, minor_of
from vllm_ssd.config import SSDConfig

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
USER = "10001"
INSTRUCTIONS = "FROM ARG WORKDIR COPY RUN USER ENV EXPOSE HEALTHCHECK ENTRYPOINT".split()
PINNED = re.compile(r"[\w./-]+:v?\d+\.\d+[\w.-]*")


@pytest.fixture(scope="module")
def dockerfile() -> list[tuple[str, str]]:
    """Instructions and what follows them, without comments."""
    text = re.sub(r"^\s*#.*\n", "", (DEPLOY / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip()]
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in lines]


@pytest.fixture(scope="module")
def services() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]


@pytest.fixture(scope="module")
def manifest() -> dict[str, dict[str, Any]]:
    return {document["kind"]: document for document in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}


def check_config(text: str) -> SSDConfig:
    """A speculative_config of a file, as the plugin would take it."""
    return SSDConfig.from_user(json.loads(re.sub(r"\$\{(\w+)[^}]*\}", r"org/\1", text)))


def test_the_image_is_pinned_and_of_a_supported_vllm(dockerfile):
    (version,) = [value.partition("=")[2] for name, value in dockerfile if name == "ARG"]
    assert SUPPORTED[0] <= minor_of(version) <= SUPPORTED[1]
    images = [value.split()[0].replace("${VLLM_VERSION}", version) for name, value in dockerfile if name == "FROM"]
    assert len(images) == 2 and all(PINNED.fullmatch(image) for image in images), images
    assert images[-1] == f"vllm/vllm-openai:v{version}"


def test_the_image_runs_as_nobody_special(dockerfile):
    names = [name for name, _ in dockerfile]
    last_from = len(names) - 1 - names[::-1].index("FROM")
    stage = dockerfile[last_from:]
    (user,) = [value for name, value in stage if name == "USER"]
    assert user == f"{USER}:{USER}"
    after = [name for name, _ in stage[[name for name, _ in stage].index("USER") :]]
    assert "RUN" not in after and "COPY" not in after
    (health,) = [value for name, value in stage if name == "HEALTHCHECK"]
    assert "--start-period=" in health and "/health" in health
    (entry,) = [value for name, value in stage if name == "ENTRYPOINT"]
    assert json.loads(entry) == ["vllm", "serve"]  # the exec form: signals reach the server


def test_a_new_volume_belongs_to_the_user(dockerfile, services):
    """Docker gives it the owner of what the image has at its place, and root where there is nothing."""
    (made,) = re.findall(r"install --directory --owner vllm --group vllm ([\w/. ]+)", dict(dockerfile)["RUN"])
    volumes = (volume.split(":") for volume in services["server"]["volumes"])
    assert [place for source, place in volumes if not source.startswith(".")] == made.split()


def test_the_image_keeps_hadolint_s_rules(dockerfile):
    for name, value in dockerfile:
        assert name in INSTRUCTIONS, f"DL3020, DL4000: {name}"
        if name == "RUN":
            for words, rule in (("sudo", "DL3004"), ("apt-get upgrade", "DL3005"), ("cd ", "DL3003")):
                assert words not in value, rule
            for part in value.split("&&"):
                if part.strip().startswith("pip "):
                    assert "--no-cache-dir" in part, f"DL3042: {part}"
        if name == "WORKDIR":
            assert value.startswith("/"), f"DL3000: {value}"
        if name == "COPY" and "--from" not in value:
            for source in value.split()[:-1]:
                assert (ROOT / source).exists(), source
        if name in ("ENV", "ARG"):
            assert not re.search(r"TOKEN|SECRET|PASSWORD|API_KEY", value)


def test_everything_that_the_wheel_needs_is_copied(dockerfile):
    copied = {
        source for name, value in dockerfile if name == "COPY" and "--from" not in value for source in value.split()
    }
    assert {"pyproject.toml", "setup.py", "README.md", "LICENSE", "vllm_ssd", "kernels"} <= copied


def test_services_are_pinned_unprivileged_and_local(services):
    assert set(services) == {"server", "prometheus", "grafana"}
    for name, service in services.items():
        assert PINNED.fullmatch(service["image"]), name
        assert service["user"].split(":")[0] not in ("0", "root") and not service.get("privileged")
        assert all(port.startswith("127.0.0.1:") for port in service["ports"]), name
        assert "healthcheck" in service or name == "server"  # the image has one
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists() and volume.endswith(":ro"), volume
        for other in service.get("depends_on", []):
            assert other in services
    assert services["server"]["cap_drop"] == ["ALL"] and services["server"]["image"].endswith(f":{__version__}")
    check_config(services["server"]["command"][2])


def test_no_secret_has_a_default(services):
    for service in services.values():
        for name, value in service.get("environment", {}).items():
            if re.search(r"TOKEN|PASSWORD", name):
                assert re.fullmatch(r"\$\{\w+(:-|:\?[^}]+)\}", value), name


def test_prometheus_and_grafana_find_each_other(services):
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    (target,) = scraped["scrape_configs"][0]["static_configs"][0]["targets"]
    assert target == "server:8000"
    mounted = {volume.split(":")[1] for service in services.values() for volume in service["volumes"]}
    assert set(scraped["rule_files"]) <= mounted
    (source,) = yaml.safe_load((DEPLOY / "grafana/provisioning/datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and source["type"] == "prometheus"
    (provider,) = yaml.safe_load((DEPLOY / "grafana/provisioning/dashboards/ssd.yml").read_text())["providers"]
    assert f"{provider['options']['path']}/ssd.json" in mounted


def test_the_parts_of_the_manifest_find_each_other(manifest):
    assert set(manifest) == {"Deployment", "Service", "PersistentVolumeClaim"}
    assert all(re.fullmatch(r"[a-z0-9-]+", document["metadata"]["name"]) for document in manifest.values())
    spec = manifest["Deployment"]["spec"]
    labels = spec["template"]["metadata"]["labels"]
    assert spec["selector"]["matchLabels"].items() <= labels.items()
    assert manifest["Service"]["spec"]["selector"].items() <= labels.items()
    (container,) = spec["template"]["spec"]["containers"]
    assert manifest["Service"]["spec"]["ports"][0]["targetPort"] in {port["name"] for port in container["ports"]}
    volumes = {volume["name"]: volume for volume in spec["template"]["spec"]["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == manifest["PersistentVolumeClaim"]["metadata"]["name"]


def test_the_pod_is_unprivileged_probed_and_limited(manifest):
    pod = manifest["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] and str(pod["securityContext"]["runAsUser"]) == USER
    assert pod["automountServiceAccountToken"] is False
    (container,) = pod["containers"]
    assert PINNED.fullmatch(container["image"]) and container["image"].endswith(f":{__version__}")
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"] == {"path": "/health", "port": "http"}
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 1200
    assert "memory" in container["resources"]["limits"] and all("value" not in entry for entry in container["env"])


@pytest.fixture
def cluster() -> Any:
    return next(
        item for item in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text()) if item["kind"] == "RayCluster"
    )


def test_kuberay_s_own_additions_find_what_they_need(cluster: Any):
    """KubeRay names the head's ports in its service and probes a container that has no probes with wget."""
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    (server,), (drafter,) = (group["template"]["spec"]["containers"] for group in (head, workers))
    ports = {port["name"]: port["containerPort"] for port in server["ports"]}
    assert ports == {"http": 8000, "gcs-server": int(head["rayStartParams"].get("port", 6379))}
    assert all(re.fullmatch(r"[a-z][a-z0-9-]{0,14}", name) for name in ports)
    assert len(cluster["metadata"]["name"]) <= 53
    assert not drafter.keys() & {"startupProbe"} and server.keys() >= {"readinessProbe", "livenessProbe"}
    for name in ("readinessProbe", "livenessProbe"):
        probe = drafter[name]["httpGet"]
        assert f'"{probe["path"]}"' in ray_source("dashboard/http_server_agent.py"), "Ray answers it without a token"
        assert f"= {probe['port']}\n" in ray_source("_private/ray_constants.py")
    assert "ray[default]" in (DEPLOY / "kuberay.yaml").read_text(), "the agent answers HTTP only with its extra"


def ray_source(path: str) -> str:
    """A file of the installed Ray, which is not imported."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    return (Path(spec.origin).parent / path).read_text()


def test_kuberay_has_a_gpu_for_each_drafter_and_asks_who_comes():
    documents = {item["kind"]: item for item in yaml.safe_load_all((DEPLOY / "kuberay.yaml").read_text())}
    assert set(documents) == {"RayCluster", "Service"}
    cluster = documents["RayCluster"]
    assert cluster["metadata"]["annotations"]["ray.io/overwrite-container-cmd"] == "true"
    head, (workers,) = cluster["spec"]["headGroupSpec"], cluster["spec"]["workerGroupSpecs"]
    for group in (head, workers):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] == int(USER)
        assert not container["securityContext"]["allowPrivilegeEscalation"] and PINNED.fullmatch(container["image"])
        assert "KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        env = {item["name"]: item for item in container["env"]}
        assert env["RAY_AUTH_MODE"]["value"] == "token"
        assert all("secretKeyRef" in env[name]["valueFrom"] for name in ("RAY_AUTH_TOKEN", "HF_TOKEN"))
    (server,) = head["template"]["spec"]["containers"]
    config = check_config(next(item["value"] for item in server["env"] if item["name"] == "SPECULATIVE_CONFIG"))
    (drafter,) = workers["template"]["spec"]["containers"]
    assert config.pool == "" and config.num_drafters <= workers["replicas"]
    assert drafter["resources"]["limits"]["nvidia.com/gpu"] == int(workers["rayStartParams"]["num-gpus"]) == 1
    assert head["rayStartParams"]["num-gpus"] == "0", "the head's GPUs are the target's"
    labels = head["template"]["metadata"]["labels"]
    assert documents["Service"]["spec"]["selector"].items() <= labels.items()
    assert not documents["Service"]["spec"]["selector"].items() <= workers["template"]["metadata"]["labels"].items()


def test_the_pod_has_a_gpu_for_the_drafter(manifest):
    (container,) = manifest["Deployment"]["spec"]["template"]["spec"]["containers"]
    (parallel,) = [int(a.partition("=")[2]) for a in container["args"] if a.startswith("--tensor-parallel-size=")]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == parallel + 1
    check_config(container["args"][container["args"].index("--speculative-config") + 1])


CONFIGS = [
    pytest.param(text, id=f"{page.stem}-{i}")
    for page in sorted((ROOT / "docs" / "recipes").glob("*.md"))
    for i, text in enumerate(re.findall(r"--speculative-config '(\{.*?\})'", page.read_text(), re.DOTALL))
]


@pytest.mark.parametrize("text", CONFIGS)
def test_recipes_have_configurations_that_are_taken(text):
    assert check_config(text).num_speculative_tokens > 1


def test_llms_txt_names_every_page():
    text = (ROOT / "docs" / "llms.txt").read_text()
    linked = set(re.findall(r"\]\(([\w/.-]+\.md)\)", text))
    pages = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert all(page in pages for page in linked)
    assert {page for page in pages if "/" not in page} - linked == {"changelog.md"}
    assert text.startswith("# vllm-ssd\n\n> ")
