"""Ray and Redis over TLS for real: the certificate script, Redis' command and Ray's settings are those of the manifests.

Where there is no Redis: apt-get install -y redis-server
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
pytestmark = pytest.mark.skipif(
    shutil.which("redis-server") is None or shutil.which("openssl") is None,
    reason="Redis or openssl is not installed: apt-get install -y redis-server openssl",
)
PASSWORD = "of-a-test"
CLUSTER = """
import ray, sys
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _redis_password=sys.argv[1])
print("nodes", len(ray.nodes()))
"""


def documents(name: str) -> dict[str, Any]:
    return {d["kind"]: d for d in yaml.safe_load_all((KUBERNETES / name).read_text("utf-8"))}


def inside(folder: Path, text: str) -> str:
    """A pod's paths moved into a folder."""
    return re.sub(r"(?<![\w/.])/(tls|ca|data|tmp)\b", rf"{folder}/\1", text)


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[int]:
    """The port of a Redis that was started as its pod does, with certificates as a Ray pod makes them."""
    for name in ("tls", "ca", "data", "tmp"):
        (tmp_path / name).mkdir()
    authority = [
        "-keyout",
        tmp_path / "ca/tls.key",
        "-out",
        tmp_path / "ca/tls.crt",
        "-days",
        "2",
        "-subj",
        "/CN=ca",
    ]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", *authority],
        check=True,
        capture_output=True,
    )
    script = documents("base/certificates.yaml")["ConfigMap"]["data"]["certify.sh"]
    env = os.environ | {"POD_NAME": "pod", "POD_IP": "127.0.0.1", "REDIS_PASSWORD": PASSWORD}
    subprocess.run(["sh", "-c", inside(tmp_path, script)], check=True, capture_output=True, env=env)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (container,) = documents("base/redis.yaml")["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    *shell, line = container["command"]
    line = inside(tmp_path, line).replace("6379", str(port)) + " --bind 127.0.0.1"
    process = subprocess.Popen([*shell, line], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(100):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def start(
    tmp_path: Path, port: int, *, left_out: str = "", scheme: str = ""
) -> subprocess.CompletedProcess[str]:
    """A Ray head with the manifests' own settings, as far as they concern Redis."""
    spec = documents("cluster/cluster.yaml")["RayCluster"]["spec"]
    (head,) = spec["headGroupSpec"]["template"]["spec"]["containers"]
    told = {e["name"]: inside(tmp_path, e["value"]) for e in head["env"] if "REDIS" in e["name"]}
    told.pop(left_out, None)
    given = scheme or spec["gcsFaultToleranceOptions"]["redisAddress"].partition("://")[0]
    env = {
        **os.environ, **told, "RAY_REDIS_ADDRESS": f"{given}://127.0.0.1:{port}", "RAY_AUTH_MODE": "disabled",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", CLUSTER, PASSWORD], env=env, capture_output=True, text=True, timeout=120
    )


def test_rays_head_keeps_its_state_in_redis_by_tls_alone(redis, tmp_path):
    assert "nodes 1" in start(tmp_path, redis).stdout
    ask = ["redis-cli", "--tls", "--cacert", str(tmp_path / "tls/ca.crt"), "-p", str(redis), "--scan"]
    keys = subprocess.run(
        ask, capture_output=True, text=True, env=os.environ | {"REDISCLI_AUTH": PASSWORD}, check=True
    ).stdout
    assert "@NODE" in keys, "Ray's nodes stand in it"
    refused = subprocess.run(ask, capture_output=True, text=True)
    assert "NOAUTH" in refused.stdout + refused.stderr
    assert start(tmp_path, redis, left_out="RAY_REDIS_CA_CERT").returncode != 0, (
        "a server of no known authority"
    )
    assert start(tmp_path, redis, scheme="redis").returncode != 0, "plain text"
