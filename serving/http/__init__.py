"""The REST API: an ASGI application around a link to engines.

`app.create_app` builds it, `app.in_process` runs it with its engine in this process. Routes describe what a body asks
for as an `Order`; `answering.answer` walks it from names to bytes.
"""
