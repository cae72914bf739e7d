"""Answering with models: the REST API, jobs, and the screening of libraries.

Imports bioseq, never training; a job is started as `python -m bioseq KIND --spec FILE`.
"""
