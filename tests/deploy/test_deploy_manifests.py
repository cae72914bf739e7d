"""deploy/ as far as it can be checked without Docker or a cluster: YAML, fields, import paths, flags, metrics."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from serving.settings import Settings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted((DEPLOY / "kubernetes").rglob("*.yaml"))

# Fields of ray.io/v1 (KubeRay 1.5) that may be used; unknown ones are dropped silently by a cluster.
CLUSTER = {
    "rayVersion", "headGroupSpec", "workerGroupSpecs", "enableInTreeAutoscaling", "autoscalerOptions",
    "gcsFaultToleranceOptions", "headServiceAnnotations", "suspend", "managedBy", "authOptions",
}  # fmt: skip
RAY = {
    "RayService": {
        "serviceUnhealthySecondThreshold", "deploymentUnhealthySecondThreshold", "serveConfigV2", "serveService",
        "rayClusterConfig", "upgradeStrategy", "excludeHeadPodFromServeSvc", "rayClusterDeletionDelaySeconds",
    },
    "RayJob": {
        "entrypoint", "entrypointNumCpus", "entrypointNumGpus", "entrypointResources", "metadata", "runtimeEnvYAML",
        "jobId", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "activeDeadlineSeconds", "rayClusterSpec",
        "submissionMode", "backoffLimit", "submitterPodTemplate", "clusterSelector", "suspend", "deletionStrategy",
    },
}  # fmt: skip
HEAD = {"rayStartParams", "template", "serviceType", "headService", "enableIngress", "resources", "labels"}
GROUP = {
    "groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template", "numOfHosts",
    "idleTimeoutSeconds", "suspend", "scaleStrategy", "resources", "labels",
}  # fmt: skip
AUTOSCALER = {
    "resources", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts", "securityContext",
    "idleTimeoutSeconds", "upscalingMode", "version",
}  # fmt: skip
STATE = {"redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"}
KINDS = {
    "RayService": "ray.io/v1", "RayJob": "ray.io/v1", "RayCluster": "ray.io/v1", "Namespace": "v1", "ServiceAccount": "v1",
    "PersistentVolumeClaim": "v1", "ConfigMap": "v1", "Service": "v1", "StatefulSet": "apps/v1",
    "NetworkPolicy": "networking.k8s.io/v1", "PodDisruptionBudget": "policy/v1", "Issuer": "cert-manager.io/v1",
    "Certificate": "cert-manager.io/v1", "Kustomization": "kustomize.config.k8s.io/v1beta1",
}  # fmt: skip
FOLDERS = ["base", "overlays/gpu", "overlays/cpu", "jobs/pretrain", "jobs/screen"]
KUBECTL = shutil.which("kubectl") is not None
needs_kubectl = pytest.mark.skipif(
    not KUBECTL,
    reason="kubectl is not installed, so kustomize cannot be run: apt-get install kubernetes-client",
)
KUBERNETES = ("1.29", "1.37")  # the oldest that deploy/README.md names, and the newest that the schemas know


CORE = {"v1", "apps", "policy", "networking.k8s.io"}
_CONTAINER = {"env", "envFrom", "volumeMounts", "resources", "securityContext", "imagePullPolicy"}


class _Strict(yaml.SafeLoader):
    """A key given twice is a mistake."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        keys = [self.construct_object(k) for k, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key is given twice"
        return super().construct_mapping(node, deep)


def load(path: Path) -> list[dict[str, Any]]:
    return [d for d in yaml.load_all(path.read_text(), _Strict) if d]


def everything(kind: str) -> list[dict[str, Any]]:
    return [d for path in MANIFESTS for d in load(path) if d["kind"] == kind]


def clusters() -> list[dict[str, Any]]:
    """The cluster as it is written and, where kubectl is, as each folder is applied."""
    found = [d["spec"] for d in everything("RayCluster")]
    for made in map(built, FOLDERS if KUBECTL else ()):
        specs = [d["spec"] for d in made if d["kind"] in RAY]
        assert len(specs) == 1
        found += [s.get("rayClusterConfig") or s["rayClusterSpec"] for s in specs]
    return found


def pods(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    return [g["template"] for g in groups]


@functools.cache
def built(folder: str) -> list[dict[str, Any]]:
    """What `kubectl apply -k` of the folder applies."""
    done = subprocess.run(
        ["kubectl", "kustomize", str(DEPLOY / "kubernetes" / folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    return [d for d in yaml.load_all(done.stdout, _Strict) if d]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_every_manifest_is_of_a_known_kind_in_its_namespace(path):
    for d in load(path):
        assert d["apiVersion"] == KINDS[d["kind"]]
        if d["kind"] not in ("Kustomization", "Namespace"):
            assert d["metadata"]["namespace"] == "bioseq"


def test_every_kustomization_names_files_that_are_there():
    for path in DEPLOY.rglob("kustomization.yaml"):
        (d,) = load(path)
        for resource in d["resources"]:
            target = path.parent / resource
            assert target.is_file() or (target / "kustomization.yaml").is_file(), resource
        listed = {path.parent / r for r in d["resources"] if r.endswith(".yaml")}
        assert listed == set(path.parent.glob("*.yaml")) - {path}


@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS)
def test_kustomize_builds(folder):
    made = built(folder)
    assert sum(d["kind"] in RAY for d in made) == 1, "one service, or one job"
    assert not any(d["kind"] == "RayCluster" for d in made), "it is a source, and never applied"
    text = yaml.dump_all(made)
    images = set(re.findall(r"image: (\S+)", text))
    assert not any(i == "bioseq" or i.startswith("bioseq:") for i in images), "an image without a registry"


@needs_kubectl
def test_overlays_differ_where_they_should():
    gpu, cpu = ({d["kind"]: d for d in built(f"overlays/{n}")} for n in ("gpu", "cpu"))
    names = [
        [g["groupName"] for g in x["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"]]
        for x in (gpu, cpu)
    ]
    assert names == [["cpu", "gpu"], ["cpu"]]
    assert "device: cuda" in gpu["RayService"]["spec"]["serveConfigV2"]
    assert "cuda" not in yaml.dump(cpu["RayService"])
    assert "0.1.0-cuda" in yaml.dump(gpu["RayService"]) and "0.1.0-cpu" in yaml.dump(cpu["RayService"])


@needs_kubectl
@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("folder", FOLDERS)
def test_what_is_applied_fits_kubernetes_own_schemas(folder, version):
    """Unknown fields are refused too. A pod of Ray is validated as the pod that KubeRay makes of it."""
    from kubernetes_validate import validate

    made = [d for d in built(folder) if d["apiVersion"].partition("/")[0] in CORE]
    for spec in (d["spec"] for d in built(folder) if d["kind"] in RAY):
        cluster = spec.get("rayClusterConfig") or spec["rayClusterSpec"]
        sidecar = {k: v for k, v in cluster["autoscalerOptions"].items() if k in _CONTAINER}
        for number, pod in enumerate(pods(cluster)):
            containers = pod["spec"]["containers"]
            if not number:  # KubeRay adds the autoscaler to the head's pod
                containers = [*containers, {"name": "autoscaler", "image": "x:1"} | sidecar]
            whole = {**pod["spec"], "containers": containers}
            made.append({"apiVersion": "v1", "kind": "Pod", "metadata": pod["metadata"], "spec": whole})
    assert len(made) >= 2
    for d in made:
        validate(d, version, strict=True)


def test_the_schemas_refuse_what_is_wrong():
    from kubernetes_validate import ValidationError, validate

    (claim,) = everything("PersistentVolumeClaim")
    for wrong in ({"accessMode": "x"}, {"accessModes": "ReadWriteMany"}):
        with pytest.raises(ValidationError):
            validate({**claim, "spec": {**claim["spec"], **wrong}}, KUBERNETES[0], strict=True)


@needs_kubectl
@pytest.mark.parametrize("folder", FOLDERS)
def test_rays_own_autoscaler_brings_the_nodes_that_are_asked_for(folder):
    """What Ray's autoscaler reads of the cluster's resource, and which pods it then starts for a demand."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
    from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
    from ray.autoscaler.v2.utils import ResourceRequestUtil

    (resource,) = [d for d in built(folder) if d["kind"] in RAY]
    cluster = resource["spec"].get("rayClusterConfig") or resource["spec"]["rayClusterSpec"]
    derived = _derive_autoscaling_config_from_ray_cr({"metadata": resource["metadata"], "spec": cluster})
    assert derived["provider"]["namespace"] == "bioseq"
    assert derived["idle_timeout_minutes"] == 5.0
    config = AutoscalingConfig(derived, skip_content_hash=True)
    kinds = config.get_node_type_configs()
    assert kinds["headgroup"].resources["CPU"] == 0, "no replica on the head"
    demands, wanted = [{"CPU": 8, "GPU": 1}] * 3, {"gpu": 3}  # workers of a run
    if resource["kind"] == "RayService":
        serve = yaml.safe_load(resource["spec"]["serveConfigV2"])["applications"][0]["deployments"]
        asked = {d["name"]: d["ray_actor_options"] for d in serve}["engine"]
        demands = [{"CPU": asked["num_cpus"], "GPU": asked.get("num_gpus", 0)}] * 3
        wanted = {"gpu": 3, "cpu": 2} if "gpu" in kinds else {"cpu": 3}  # two of CPUs are always there
    request = SchedulingRequest(
        node_type_configs=kinds,
        max_num_nodes=config.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make({k: v for k, v in d.items() if v}) for d in demands]
        ),
        disable_launch_config_check=True,
    )
    reply = ResourceDemandScheduler().schedule(request)
    assert not reply.infeasible_resource_requests
    launched = {r.instance_type: r.count for r in reply.to_launch if r.instance_type != "headgroup"}
    assert launched == wanted


def test_ray_kinds_use_fields_that_exist():
    for kind, known in RAY.items():
        found = everything(kind)
        assert found
        for d in found:
            assert set(d) == {"apiVersion", "kind", "metadata", "spec"} and set(d["spec"]) <= known
    for cluster in clusters():
        assert set(cluster) <= CLUSTER
        assert set(cluster["headGroupSpec"]) <= HEAD
        assert set(cluster["autoscalerOptions"]) <= AUTOSCALER
        assert set(cluster.get("gcsFaultToleranceOptions", {})) <= STATE
        names = [g["groupName"] for g in cluster["workerGroupSpecs"]]
        assert len(set(names)) == len(names)
        for group in cluster["workerGroupSpecs"]:
            assert set(group) <= GROUP
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def serve_configs() -> list[dict[str, Any]]:
    texts = [d["spec"]["serveConfigV2"] for d in everything("RayService")]
    for (d,) in map(load, DEPLOY.glob("kubernetes/overlays/*/kustomization.yaml")):
        for patch in d.get("patches", []):
            texts += [
                op["value"]
                for op in yaml.load(patch["patch"], _Strict)
                if op["path"].endswith("serveConfigV2")
            ]
    return [yaml.load(text, _Strict) for text in texts]


def test_serve_configs_pass_rays_own_schema_and_name_what_exists():
    from ray.serve.schema import ServeDeploySchema

    from serving.cluster import deployment

    configs = serve_configs()
    assert len(configs) == 2
    for config in configs:
        schema = ServeDeploySchema.model_validate(config)
        (app,) = schema.applications
        module, name = app.import_path.split(":")
        assert callable(getattr(importlib.import_module(module), name))
        settings = Settings.from_dict(app.args)  # unknown settings are refused
        assert settings.database and settings.data == "/data"
        source = Path(str(deployment.__file__)).read_text()
        for d in app.deployments:
            assert f'name="{d.name}"' in source, f"there is no deployment {d.name}"
        engine = next(d for d in app.deployments if d.name == "engine")
        assert engine.ray_actor_options.num_gpus == settings.engine_gpus or not settings.engine_gpus
        api = next(d for d in app.deployments if d.name == "api")
        assert api.num_replicas == settings.ingress_replicas
        assert not api.ray_actor_options.num_gpus


def test_the_gpu_service_scales_from_and_to_nothing():
    (service,), (cluster,) = everything("RayService"), everything("RayCluster")
    gpu = next(g for g in cluster["spec"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    assert gpu["minReplicas"] == 0 and cluster["spec"]["enableInTreeAutoscaling"]
    args = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert args["min_engine_replicas"] == 0 and args["max_engine_replicas"] <= gpu["maxReplicas"]
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"


def test_the_autoscaling_that_build_makes_is_accepted_by_serve():
    from serving.cluster.deployment import build

    args = yaml.safe_load(everything("RayService")[0]["spec"]["serveConfigV2"])["applications"][0]["args"]
    app = build(args | {"database": "sqlite://"})
    assert app is not None


def test_entrypoints_are_commands_that_parse():
    """Every flag of a RayJob's entrypoint exists, as the command's own parser says."""
    from serving.screening.cli import _parser as screen_parser
    from serving.screening.cli import spec_from
    from training.pretrain.command import run_parser, spec_of

    found = {}
    for path in (DEPLOY / "kubernetes" / "jobs").glob("*/kustomization.yaml"):
        (d,) = load(path)
        ops = [op for patch in d["patches"] for op in yaml.load(patch["patch"], _Strict)]
        entrypoints = [op["value"] for op in ops if op["path"] == "/spec/entrypoint"]
        if path.parent.name == "base":
            continue
        (line,) = entrypoints
        words = shlex.split(line)
        assert words[:3] == ["python", "-m", "bioseq"]
        found[words[3]] = words[4:]
    assert set(found) == {"pretrain", "screen"}
    assert found["pretrain"][0] == "run"
    spec = spec_of(run_parser().parse_args(found["pretrain"][1:]))
    assert spec.resume and spec.engine == "ray" and spec.address == "auto" and spec.workers.gpus
    parser = screen_parser()
    screen = spec_from(parser.parse_args(found["screen"]), parser)
    assert screen.address == "auto" and screen.workers == 8


def test_ray_is_shut_to_strangers():
    for cluster in clusters():
        assert cluster["authOptions"] == {"mode": "token"}
        for pod in pods(cluster):
            assert pod["metadata"]["labels"]["app.kubernetes.io/name"] == "bioseq-ray"
            env = {e["name"]: e.get("value") for c in pod["spec"]["containers"] for e in c["env"]}
            assert env["RAY_USE_TLS"] == "1"
            for name in ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT"):
                assert env[name].startswith("/tls/")
            (certify,) = pod["spec"]["initContainers"]
            assert certify["command"] == ["sh", "/certify/certify.sh"]
    policies = {p["metadata"]["name"]: p["spec"] for p in everything("NetworkPolicy")}
    assert policies["bioseq-deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    anywhere = [r for r in policies["bioseq-ray-egress"]["egress"] if "to" not in r]
    assert {p["port"] for r in anywhere for p in r["ports"]} == {443, 6443, 5432}, "and nothing else leaves"
    for rule in policies["bioseq-ray"]["ingress"]:
        if rule["from"] == [{"podSelector": {"matchLabels": {"app.kubernetes.io/name": "bioseq-ray"}}}]:
            continue
        ports = {p["port"] for p in rule["ports"]}
        operator = any("podSelector" in f for f in rule["from"])
        assert ports <= ({8000, 8265} if operator else {8000}), "only the operator reaches the dashboard"


def test_certificates_are_signed_for_each_pod():
    maps = [d for d in everything("ConfigMap") if "certify.sh" in d.get("data", {})]
    (script,) = [d["data"]["certify.sh"] for d in maps]
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert "$POD_IP" in script and "subjectAltName" in script
    made = {d["spec"]["secretName"]: d["spec"] for d in everything("Certificate")}
    assert set(made) == {"bioseq-ray-ca", "bioseq-redis-tls"}
    assert made["bioseq-ray-ca"]["isCA"] and "isCA" not in made["bioseq-redis-tls"]
    issuers = {d["metadata"]["name"]: d["spec"] for d in everything("Issuer")}
    assert issuers[made["bioseq-redis-tls"]["issuerRef"]["name"]] == {"ca": {"secretName": "bioseq-ray-ca"}}


def test_redis_is_reached_by_tls_under_a_name_that_its_certificate_has():
    (cluster,) = everything("RayCluster")
    address = urlsplit(cluster["spec"]["gcsFaultToleranceOptions"]["redisAddress"])
    assert address.scheme == "rediss"
    (certificate,) = [d["spec"] for d in everything("Certificate") if "redis" in d["metadata"]["name"]]
    assert address.hostname in certificate["dnsNames"]
    (head,) = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    env = {e["name"]: e.get("value") for e in head["env"]}
    assert env["RAY_REDIS_CA_CERT"] == env["RAY_TLS_CA_CERT"]
    (redis,) = [d["spec"]["template"]["spec"] for d in everything("StatefulSet")]
    (volume,) = redis["volumes"]
    assert volume["secret"]["secretName"] == certificate["secretName"]


def test_pods_run_without_privileges():
    specs = [p["spec"] for c in clusters() for p in pods(c)]
    specs += [d["spec"]["template"]["spec"] for d in everything("StatefulSet")]
    for spec in specs:
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["automountServiceAccountToken"] is False or "serviceAccountName" in spec
        for c in spec["containers"] + spec.get("initContainers", []):
            assert c["securityContext"]["allowPrivilegeEscalation"] is False
            assert c["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in c["resources"]["limits"]


def test_secrets_are_references_only():
    assert not everything("Secret")
    for path in [*MANIFESTS, DEPLOY / "compose.yaml"]:
        for line in path.read_text().splitlines():
            if re.search(r"(password|\btoken|secret)\w*\s*[:=]\s*\S", line, re.I):
                assert re.search(
                    r"\$\{?\w+|secretName|secretKeyRef|mode: token|automount|requirepass|#", line, re.I
                ), line


def test_volumes_and_claims_are_there():
    claims = {d["metadata"]["name"] for d in everything("PersistentVolumeClaim")}
    for cluster in clusters():
        for pod in pods(cluster):
            volumes = {v["name"]: v for v in pod["spec"]["volumes"]}
            for v in volumes.values():
                if "persistentVolumeClaim" in v:
                    assert v["persistentVolumeClaim"]["claimName"] in claims
            for c in pod["spec"]["containers"] + pod["spec"]["initContainers"]:
                assert {m["name"] for m in c["volumeMounts"]} <= set(volumes)


def test_disruption_budgets_and_policies_select_pods_that_exist():
    labels = [p["metadata"]["labels"] for c in clusters() for p in pods(c)]
    labels += [d["spec"]["template"]["metadata"]["labels"] for d in everything("StatefulSet")]
    for d in everything("PodDisruptionBudget") + everything("NetworkPolicy"):
        wanted = (d["spec"].get("selector") or d["spec"]["podSelector"]).get("matchLabels", {})
        assert any(wanted.items() <= x.items() for x in labels), d["metadata"]["name"]


def test_ray_versions_agree():
    import ray

    for cluster in clusters():
        assert cluster["rayVersion"] == ray.__version__
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints.txt").read_text(), re.M)
    assert pinned and pinned[1] == ray.__version__


# ---------------------------------------------------------------------------------------------------- compose


def test_compose_publishes_on_loopback_only_and_needs_its_passwords():
    (d,) = load(DEPLOY / "compose.yaml")
    assert set(d["services"]) == {"service", "database", "prometheus", "grafana"}
    for service in d["services"].values():
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:")
        image = service["image"]
        assert ":" in image and not image.endswith("latest")
        for volume in service.get("volumes", []):
            name = volume.split(":")[0]
            if name.startswith("."):
                assert (DEPLOY / name).exists(), volume
            else:
                assert name in d["volumes"]
    text = (DEPLOY / "compose.yaml").read_text()
    given = set(re.findall(r"\$\{(\w+):\?", text))
    example = (DEPLOY / "compose.env.example").read_text()
    assert given and all(f"{name}=" in example for name in given)


def test_compose_and_docker_commands_are_real():
    from serving.commands import _serve_parser

    (d,) = load(DEPLOY / "compose.yaml")
    command = d["services"]["service"]["command"]
    assert command[:2] == ["bioseq", "serve"]
    _serve_parser().parse_args(command[2:])
    (line,) = [x for x in dockerfile() if x.startswith("CMD")]
    words = json.loads(line[4:])
    assert words[:2] == ["bioseq", "serve"]
    _serve_parser().parse_args(words[2:])


def dockerfile() -> list[str]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return [x.strip() for x in text.splitlines() if x.strip() and not x.startswith("#")]


def test_the_image_is_built_in_stages_and_runs_as_nobody_special():
    lines = dockerfile()
    assert sum(x.startswith("FROM") for x in lines) == 2
    assert [x for x in lines if x.startswith("USER")] == ["USER 10001:10001"]
    for line in lines:
        if line.startswith("COPY") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists() or source == "README.md", source
    (base,) = [x for x in lines if x.startswith("ARG BASE=")]
    assert re.search(r":\d+\.\d+\.\d+-", base), "the base image is pinned"
    assert any("torch" in x and "-c constraints.txt" in x for x in lines)


# ------------------------------------------------------------------------------------------------- dashboards


def test_every_query_of_the_dashboard_asks_for_a_metric_that_the_service_has():
    from serving.telemetry.metrics import EngineMetrics, IngressMetrics

    text = IngressMetrics().text() + EngineMetrics().text()
    known = {x.split()[2] for x in text.splitlines() if x.startswith("# TYPE")}
    jobs = (ROOT / "serving" / "http" / "routes" / "jobs.py").read_text()
    known |= set(re.findall(r'Gauge\("(\w+)"', jobs))
    board = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
    asked = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"\bbioseq_\w+", target["expr"])
    }
    assert len(asked) >= 10
    for name in asked:
        assert name in known or re.sub(r"_(bucket|sum|count)$", "", name) in known, name
    ids = [p["id"] for p in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_prometheus_scrapes_a_service_of_the_compose_file():
    (config,) = load(DEPLOY / "prometheus" / "prometheus.yml")
    (scrape,) = config["scrape_configs"]
    host, port = scrape["static_configs"][0]["targets"][0].split(":")
    (compose,) = load(DEPLOY / "compose.yaml")
    assert host in compose["services"] and port == "8000" and scrape["metrics_path"] == "/metrics"
    (source,) = load(DEPLOY / "grafana" / "provisioning" / "datasources" / "prometheus.yaml")
    assert source["datasources"][0]["url"] == "http://prometheus:9090"


# ------------------------------------------------------------------------------------------------------ README


def test_the_readme_names_files_settings_and_commands_that_exist():
    text = (DEPLOY / "README.md").read_text()
    for name in re.findall(r"`((?:deploy|docs|kubernetes|grafana|prometheus)/[\w./-]+)`", text):
        assert (ROOT / name).exists() or (DEPLOY / name).exists(), name
    for name in re.findall(r"`(\w+)` \(setting", text):
        assert name in {f.name for f in dataclasses.fields(Settings)}, name
    assert "not been run" in text, "what was not tried must be marked"


def test_the_autoscaler_has_its_token_workers_have_none_and_every_drain_may_go_on():
    for cluster in clusters():
        assert cluster["enableInTreeAutoscaling"] is True
        assert cluster["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is True
        for group in cluster["workerGroupSpecs"]:
            assert group["template"]["spec"]["automountServiceAccountToken"] is False
    for budget in everything("PodDisruptionBudget"):
        assert budget["spec"]["maxUnavailable"] >= 1


def test_the_autoscaler_speaks_tls_as_all_of_ray_does():
    """It is a container of the head's pod that KubeRay adds: what it lacks here it has not got, and no node ever comes."""
    found = 0
    for cluster in clusters():
        options = cluster.get("autoscalerOptions")
        if options is None:
            continue
        found += 1
        (head,) = (
            c for c in cluster["headGroupSpec"]["template"]["spec"]["containers"] if c["name"] == "ray-head"
        )
        tls = [e for e in head["env"] if "TLS" in e["name"]]
        assert tls and [e for e in options["env"] if "TLS" in e["name"]] == tls
        assert {"name": "tls", "mountPath": "/tls", "readOnly": True} in options["volumeMounts"]
    assert found, "no cluster sets its autoscaler up"


def test_serves_proxies_bound_what_they_keep():
    from serving.cluster.pace import IN_PROXY

    module, name = IN_PROXY.split(":")
    assert callable(getattr(importlib.import_module(module), name))
    for cluster in clusters():
        for pod in pods(cluster):
            env = {e["name"]: e.get("value") for c in pod["spec"]["containers"] for e in c["env"]}
            assert env["RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"] == IN_PROXY
            assert env["RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD"] == "0", "a second thread would not wait"


def test_metrics_are_not_open_to_the_gateway():
    for path in MANIFESTS:
        assert "open_metrics" not in path.read_text("utf-8"), path
