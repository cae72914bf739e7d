"""Schemathesis against the OpenAPI document: no 5xx, every response as documented; good and bad data."""

from __future__ import annotations

import contextlib

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

CHECKS = [not_a_server_error, content_type_conformance, response_schema_conformance, status_code_conformance]
OTHERS = ("/v1/files", "/v1/jobs", "/v1/campaigns")  # tested in their own room


def conform(operation, mode: GenerationMode, examples: int) -> int:
    """Requests made of this kind to this operation."""
    made = [0]

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def check(case):
        made[0] += 1
        case.call_and_validate(checks=CHECKS, timeout=60)

    with contextlib.suppress(Unsatisfiable):  # a route without parameters knows no bad data
        check()
    return made[0]


def test_every_operation_conforms(live):
    with live(max_request_tokens=100_000, body_s=5.0) as service:
        schema = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
        seen = {}
        for result in schema.get_all_operations():
            operation = result.ok()
            if operation.path.startswith(OTHERS):
                continue
            name = f"{operation.method.upper()} {operation.path}"
            body = operation.method.lower() == "post"
            seen[name] = conform(operation, GenerationMode.POSITIVE, 8 if body else 3)
            if body or "{" in operation.path:
                seen[name] += conform(operation, GenerationMode.NEGATIVE, 8 if body else 3)
    assert len(seen) >= 14 and all(seen.values()), seen
