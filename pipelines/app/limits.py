"""Requests that the server refuses before it reads them."""

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class SmallRequests:
    """ASGI middleware that stops requests larger than the page or a client needs (413).

    It refuses all uploads (403): the page does not take files.
    """

    most = 64 * 1024
    """The largest request, in bytes."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].rstrip("/").endswith("/upload"):
            await PlainTextResponse("Files cannot be uploaded here.", 403)(scope, receive, send)
            return
        taken = 0

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most:
                raise HTTPException(413, f"A request may have at most {self.most} bytes.")
            return message

        await self.app(scope, counted if scope["type"] == "http" else receive, send)
