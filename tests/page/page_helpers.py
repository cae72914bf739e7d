"""The service in a thread, and a browser's tab that notes what goes wrong."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any


class Site:
    """The service in a thread of its own, with keys on if `key` is given."""

    def __init__(self, folder: Path, registry: Any, **settings: Any):
        from live_service import free_port

        from serving.settings import Settings

        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.settings = Settings.from_dict(
            {
                "database": f"sqlite:///{folder / 'service.sqlite'}", "home": str(folder / "home"),
                "data": str(folder / "data"), "threads": 1, "homologs": "none", "log_file": str(folder / "log"),
                **settings,
            }
        )  # fmt: skip
        self.registry = registry
        self.ready = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    async def _run(self) -> None:
        import uvicorn

        from serving.http.app import in_process

        async with in_process(self.settings, registry=self.registry) as app:
            self.server = uvicorn.Server(
                uvicorn.Config(app, host="127.0.0.1", port=self.port, log_level="error", lifespan="off")
            )
            self.server.install_signal_handlers = lambda: None  # type: ignore[attr-defined]
            task = asyncio.create_task(self.server.serve())
            while not self.server.started and not task.done():
                await asyncio.sleep(0.02)
            self.ready.set()
            await task

    def __enter__(self) -> Site:
        self.thread.start()
        assert self.ready.wait(120)
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(60)


class Tab:
    """A page; `troubles` are console errors, uncaught errors and requests to another origin."""

    def __init__(self, browser: Any, url: str, **context: Any):
        self.context = browser.new_context(viewport={"width": 1200, "height": 900}, **context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.url = url
        self.troubles: list[str] = []
        self.page.on("console", lambda m: m.type == "error" and self.troubles.append(m.text))
        self.page.on("pageerror", lambda e: self.troubles.append(str(e)))
        self.page.on("request", self._request)

    def _request(self, request: Any) -> None:
        if not request.url.startswith((self.url + "/", "blob:" + self.url, "data:")):
            self.troubles.append(f"asked {request.url}")

    def go(self, view: str = "predict") -> Any:
        self.page.goto(f"{self.url}/#/{view}")
        return self.page
