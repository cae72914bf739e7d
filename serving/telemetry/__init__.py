"""Logs, Prometheus metrics and OpenTelemetry traces. Nothing that a user sent is written to any of them."""
