"""`bioseq jobs`: options before and after the action."""

from __future__ import annotations

import functools
import json

import httpx
import pytest

from serving.jobs.commands import jobs

JOB = {"id": "j1", "kind": "finetune", "name": None, "state": "PENDING", "waiting_before": 2}


@pytest.fixture
def asked(monkeypatch):
    """The requests that the command sends."""
    from bioseq.client import sync

    requests = []

    def answer(request):
        requests.append(request)
        return httpx.Response(200, json=JOB if request.method == "POST" else {"data": []})

    connect = functools.partial(sync.connect, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(sync, "connect", connect)
    for name in ("BIOSEQ_SERVER", "BIOSEQ_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    return requests


@pytest.fixture
def spec(tmp_path):
    path = tmp_path / "job.toml"
    path.write_text('kind = "finetune"\ntargets = ["t"]\n')
    return str(path)


OPTIONS = ["--server", "http://here", "--api-key", "bsk_x", "--json"]


@pytest.mark.parametrize("cut", range(len(OPTIONS) + 1))
def test_options_stand_before_the_action_or_after_it(asked, spec, capsys, cut):
    if cut in (1, 3):  # between an option and its value
        cut += 1
    assert jobs([*OPTIONS[:cut], "submit", spec, *OPTIONS[cut:]]) == 0
    (request,) = asked
    assert request.url.host == "here" and request.headers["Authorization"] == "Bearer bsk_x"
    assert json.loads(capsys.readouterr().out) == JOB


def test_what_stands_nearer_wins_and_the_environment_is_last(asked, monkeypatch):
    assert jobs(["--server", "http://far", "list", "--server", "http://near"]) == 0
    monkeypatch.setenv("BIOSEQ_SERVER", "http://environment")
    assert jobs(["files"]) == 0
    assert jobs(["--server", "http://far", "files"]) == 0
    assert [r.url.host for r in asked] == ["near", "environment", "far"]


def test_no_server_is_wrong_use(asked, spec, capsys):
    with pytest.raises(SystemExit) as caught:
        jobs(["submit", spec])
    assert caught.value.code == 2 and "--server URL is missing" in capsys.readouterr().err


def test_submit_overrides_fields_and_tells_what_waits(asked, spec, capsys):
    assert (
        jobs(["submit", spec, "--set", "split.kind=random", "--set", "epochs=3", "--server", "http://x"]) == 0
    )
    assert json.loads(asked[0].content)["spec"] == {
        "targets": ["t"],
        "split": {"kind": "random"},
        "epochs": 3,
    }
    out = capsys.readouterr()
    assert out.out == "j1\n" and "PENDING, 2 of yours before it" in out.err
