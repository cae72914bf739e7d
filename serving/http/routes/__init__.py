"""Routes, one file a resource. Each has a `router`; `serving.http.app` includes them."""
