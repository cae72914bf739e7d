"""Routes, one file a resource. Each has a `router`; `serving.app` includes them."""
