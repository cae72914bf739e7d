"""The Serve application without a cluster: what it is built of, the scaling policy, the settings, the database."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from bioseq.errors import SpecError
from serving.database.base import Database
from serving.database.keys import Keys
from serving.settings import Settings
from serving.telemetry.metrics import join


def context(tokens: dict[str, float], *, busy: dict[str, float] | None = None, low=0, high=8, requests=0):
    return SimpleNamespace(
        aggregated_metrics={"queued_tokens": tokens, "busy": busy or {}},
        total_num_requests=requests,
        capacity_adjusted_min_replicas=low,
        capacity_adjusted_max_replicas=high,
    )


def test_replicas_follow_the_queued_tokens():
    from serving.cluster.deployment import TokensPolicy

    policy = TokensPolicy(target=1000)
    assert policy(context({}))[0] == 0
    assert policy(context({}, requests=1))[0] == 1
    assert policy(context({"a": 900.0}))[0] == 1
    assert policy(context({"a": 1500.0, "b": 1200.0}))[0] == 3
    assert policy(context({"a": 1e9}))[0] == 8
    assert policy(context({}, low=2))[0] == 2


def test_a_fleet_that_keeps_up_stays():
    """Nothing waits, and four engines are busy: they are all needed."""
    from serving.cluster.deployment import TokensPolicy

    policy = TokensPolicy(target=1000)
    names = "abcd"
    assert policy(context({}, busy=dict.fromkeys(names, 0.75)))[0] == 4
    assert policy(context({}, busy=dict.fromkeys(names, 1.0)))[0] == 5
    assert policy(context({}, busy=dict.fromkeys(names, 0.2)))[0] == 1
    assert policy(context({"a": 900.0}, busy=dict.fromkeys(names, 0.8)))[0] == 5


def test_build_gives_the_two_deployments(settings):
    from ray.serve.schema import LoggingConfig  # noqa: F401 - Serve is importable here

    from serving.cluster.deployment import build

    plain = settings(engine_replicas=2, engine_gpus=0.5).to_dict()
    app = build(plain)
    engine = app._bound_deployment.init_args[1]._bound_deployment
    assert app._bound_deployment.name == "api" and engine.name == "engine"
    assert engine.num_replicas == 2
    assert engine.ray_actor_options["num_gpus"] == 0.5
    scaling = build(settings(max_engine_replicas=5, target_queued_tokens=77).to_dict())
    config = scaling._bound_deployment.init_args[1]._bound_deployment._deployment_config.autoscaling_config
    assert (config.min_replicas, config.max_replicas) == (0, 5)
    assert config.policy.policy_kwargs == {"target": 77}


def test_config_file_of_the_docs_is_valid(settings):
    import re
    from pathlib import Path

    import yaml
    from ray.serve.schema import ServeDeploySchema

    text = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    data = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    schema = ServeDeploySchema.model_validate(data)
    application = schema.applications[0]
    assert application.import_path == "serving.cluster.deployment:build"
    Settings.from_dict(application.args)


def test_settings_refuse_what_they_do_not_know():
    with pytest.raises(SpecError, match="max_itmes"):
        Settings.from_dict({"max_itmes": 3})
    with pytest.raises(SpecError):
        Settings(max_items=0)
    with pytest.raises(SpecError):
        Settings(max_queue_s=float("nan"))
    assert not Settings(host="0.0.0.0").on_loopback and Settings().on_loopback
    again = Settings.from_dict(Settings(roots=("a",)).to_dict())
    assert again.roots == ("a",)


def test_metrics_of_several_processes_join():
    one = '# HELP a_total x\n# TYPE a_total counter\na_total{k="v"} 1.0\n'
    two = "# HELP a_total x\n# TYPE a_total counter\na_total 2.0\n# TYPE b gauge\nb 3.0\n"
    assert join({"p": one, "q": two}).splitlines() == [
        "# HELP a_total x",
        "# TYPE a_total counter",
        'a_total{process="p",k="v"} 1.0',
        'a_total{process="q"} 2.0',
        "# TYPE b gauge",
        'b{process="q"} 3.0',
    ]


def test_migrations_build_what_the_models_say(settings):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    import serving.jobs.tables  # noqa: F401 - its tables are part of the history
    from serving.database.base import Base

    database = Database(settings().database)
    database.upgrade()
    database.upgrade()
    with database.engine.connect() as connection:
        differences = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert not differences


def test_limits_hold_over_many_writers(settings):
    """Forty requests at once against a limit of ten: exactly ten pass."""
    from concurrent.futures import ThreadPoolExecutor

    database = Database(settings().database)
    database.upgrade()
    keys = Keys(database)
    key, _ = keys.create("x", requests_per_minute=10)
    with ThreadPoolExecutor(8) as pool:
        passed = list(pool.map(lambda _: keys.spend(key, 5, 1), range(40)))
    assert passed.count(None) == 10 and passed.count("requests") == 30
    assert keys.used(key.id) == (10, 10)


def test_keys_command(tmp_path, capsys):
    from bioseq.cli import main

    url = f"sqlite:///{tmp_path / 'k.sqlite'}"
    assert main(["keys", "--database", url, "create", "alice", "--scopes", "read,train", "--days", "3"]) == 0
    out, err = capsys.readouterr()
    text = out.strip()
    assert text.startswith("bsk_") and text not in err
    key = Keys(Database(url)).check(text)
    assert key and key.scopes == {"read", "train"} and key.allows("read") and not key.allows("admin")
    assert main(["keys", "--database", url, "revoke", key.id]) == 0
    assert main(["keys", "--database", url, "list"]) == 0
    out, _ = capsys.readouterr()
    assert "alice" in out and "revoked" in out and text not in out
    assert Keys(Database(url)).check(text) is None
    assert main(["keys", "--database", url, "revoke", "nope"]) == 1
    assert main(["keys", "--database", url, "create", "bob", "--scopes", "king"]) == 1


def test_serves_inner_port_is_shut_or_the_replica_does_not_start(monkeypatch):
    from ray.serve._private import replica

    from bioseq.errors import ResourceError
    from serving.cluster import deployment

    for name in ("RAY_USE_TLS", "RAY_SERVE_USE_GRPC_BY_DEFAULT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", lambda server, address: 50123)
    deployment.shut_inner_port()
    assert replica.add_port_to_grpc_server(None, "[::]:0") == 0
    monkeypatch.delattr(replica, "add_port_to_grpc_server")  # a Ray that calls it otherwise
    with pytest.raises(ResourceError, match="does not know"):
        deployment.shut_inner_port()
    deployment.check_inner_port([("127.0.0.1", 8000), ("10.0.0.3", 10002)])
    with pytest.raises(ResourceError, match="port 50123"):
        deployment.check_inner_port([("127.0.0.1", 8000), ("::", 50123)])
    monkeypatch.setenv("RAY_USE_TLS", "1")
    deployment.shut_inner_port()
    deployment.check_inner_port([("::", 50123)])


def test_a_ray_whose_queues_are_unknown_is_refused():
    """What bounds an upload are names of Serve's own: if one goes, nothing starts unbounded in silence."""
    import types

    from bioseq.errors import ResourceError
    from serving.cluster.pace import _known

    queue = type("MessageQueue", (), {"put_nowait": None})
    with pytest.raises(ResourceError, match="cannot bound"):
        _known(types.SimpleNamespace(MessageQueue=queue), "MessageQueue", "put_nowait", "close")
    with pytest.raises(ResourceError, match=r"constraints\.txt"):
        _known(types.SimpleNamespace(), "MessageQueue")


def test_every_deployment_looks_for_the_inner_port_in_its_health_check(monkeypatch):
    import asyncio

    from bioseq.errors import ResourceError
    from serving.cluster import deployment

    monkeypatch.delenv("RAY_USE_TLS", raising=False)
    monkeypatch.setattr(deployment, "_listeners", lambda: [("::", 50123)])
    for kind in (deployment.EngineReplica, deployment.SearchReplica, deployment.Ingress):
        with pytest.raises(ResourceError, match="inner port"):
            asyncio.run(kind.check_health(object.__new__(kind)))
