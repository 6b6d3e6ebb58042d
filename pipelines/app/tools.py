"""The app as an MCP server: tools with few parameters. Pictures are image blocks, their figures are structured."""

import base64
import reprlib
import secrets
from collections import OrderedDict
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Annotated, Any, TypeVar

import anyio
import gradio as gr
from anyio import to_thread
from mcp.server.fastmcp import Context, FastMCP
from mcp.server.fastmcp.exceptions import ToolError
from mcp.types import CallToolResult, ImageContent, TextContent, Tool
from PIL import Image
from pydantic import BaseModel, Field, ValidationError
from starlette.types import ASGIApp, Receive, Scope, Send

from diffusers_guidance import samples
from diffusers_guidance.pipelines.app import settings as app_settings
from diffusers_guidance.pipelines.app import show as app_show
from diffusers_guidance.pipelines.app import work as app_work
from diffusers_guidance.pipelines.app.controls import sentences
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    EXAMPLES,
    OWN,
    PRESETS,
    SCHEDULERS,
    Generation,
    Grid,
    Trial,
)
from diffusers_guidance.pipelines.app.work import Learned, News, Studio
from diffusers_guidance.pipelines.pictures.make import png_of
from diffusers_guidance.policies import Forecast

R = TypeVar("R")
PATH = "/gradio_api/mcp"
FIRST = next(iter(PRESETS))
WAITING = 32
"""How many calls may wait for the device."""
REMEMBERED = 128
"""How many lessons the server keeps; it forgets the one first that was not used for the longest time."""

Prompt = Annotated[
    str, Field(description="What the picture shows. The bundled models draw emoji: things, animals, faces.")
]
Seed = Annotated[int, Field(description="The same seed gives the same picture.")]
Steps = Annotated[
    int, Field(description="Steps of the scheduler, 1 to 100.", json_schema_extra={"minimum": 1, "maximum": 100})
]
Model = Annotated[str, Field(description=f"One of {', '.join(samples.models())}, or a model that the server allows.")]
Scheduler = Annotated[
    str, Field(description=f"One of: {', '.join(SCHEDULERS)}.", json_schema_extra={"enum": [*SCHEDULERS]})
]
Ways = Annotated[
    list[str],
    Field(
        description="Rule + policy @ scale, or a part of it: CFG, APG+AG@12, Forecast(0.4), Hold(2), "
        'search(25, calibration="dpm-20-5"). "default" is what attach(pipe) chooses.'
    ),
]


class Made(BaseModel):
    """A picture's settings and cost."""

    prompt: str
    seed: int
    rule: str
    policy: str
    guidance_scale: float | str
    steps: int
    nfe: int = Field(description="The network evaluations of the run.")
    nfe_full: int = Field(description="The network evaluations of plain CFG.")
    seconds: float
    saturation: float = Field(description="0 is grey, 1 is burnt.")
    unread: str = Field(description="The end of the prompt that the model does not read.")
    link: str = Field(description="A query of the page, with these settings.")
    learned: str = Field(description="With `learn`: what this picture taught, or which record it used.")
    lesson: str = Field(description="With `learn`: the name of the record, for the next call.")


class Lessons:
    """What pictures taught, under names that nobody can guess, since calls have no session that could keep it."""

    def __init__(self, most: int = REMEMBERED):
        self.most, self.known = most, OrderedDict[str, Learned]()

    def find(self, name: str) -> Learned | None:
        """What is kept under a name; None for an empty name.

        Raises:
            ValueError: it is not known, or no longer.
        """
        if not name:
            return None
        if name not in self.known:
            raise ValueError(f"lesson={name!r} is not known here, or no longer: call with learn for a new one.")
        self.known.move_to_end(name)
        return self.known[name]

    def keep(self, learned: Learned | None, name: str) -> str:
        """The name for what a call learned, or the one that it used."""
        if learned is None or self.known.get(name) is learned:
            return name if learned else ""
        name = secrets.token_urlsafe(9)
        self.known[name] = learned
        while len(self.known) > self.most:
            self.known.popitem(last=False)
        return name


class OneWay(BaseModel):
    """A picture of a grid."""

    name: str
    nfe: int = Field(description="The network evaluations of the run.")
    nfe_full: int = Field(description="The network evaluations of plain CFG.")
    seconds: float
    saturation: float = Field(description="0 is grey, 1 is burnt.")
    psnr: float | None = Field(
        description="In dB, to the picture of plain CFG at the same scale; null if the grid does not have that one."
    )


class Compared(BaseModel):
    """What each picture of a grid cost, and how near it is to plain CFG's."""

    columns: list[OneWay]


class OnePolicy(BaseModel):
    """A row of a benchmark: a mean over its prompts."""

    series: str
    label: str
    nfe: float = Field(description="The network evaluations of one picture.")
    psnr: float = Field(description="In dB, to full CFG.")
    ssim: float = Field(description="To full CFG; 1 is equal.")
    seconds: float
    ratio: float = Field(description="Its seconds over those of full CFG right before and after it.")


class Measured(BaseModel):
    """What each policy costs, and how near it comes to full CFG. The first row is full CFG."""

    rows: list[OnePolicy]
    recommended: str = Field(description="The label of the recommended row.")


class Server(FastMCP):
    """A server that refuses parameters which a tool does not have, and answers every mistake in a sentence."""

    async def list_tools(self) -> list[Tool]:
        tools = await super().list_tools()
        return [each.model_copy(update={"inputSchema": {**each.inputSchema, **CLOSED}}) for each in tools]

    async def call_tool(self, name: str, arguments: dict[str, Any]) -> Any:
        known: dict[str, Any] = {tool.name: tool.inputSchema["properties"] for tool in await super().list_tools()}
        if name not in known:
            raise ToolError(f"{name} is not a tool: there are {', '.join(known)}.")
        if unknown := arguments.keys() - known[name]:
            raise ToolError(f"{min(unknown)} is not a parameter: there are {', '.join(known[name])}.")
        try:
            return await super().call_tool(name, arguments)
        except ToolError as error:
            match error.__cause__:
                case ValidationError() as cause:
                    first = cause.errors(include_url=False)[0]
                    at = ".".join(str(part) for part in first["loc"][:2])
                    raise ToolError(f"{at}={reprlib.repr(first['input'])}: {first['msg']}.") from None
                case ToolError() as cause:  # without the words that FastMCP puts before it
                    raise cause from None
            raise


CLOSED = {"additionalProperties": False}


def make_server(studio: Studio, host: str) -> FastMCP:
    """The server with its tools. Each call is a job that waits for its turn, like a visitor's."""
    server = Server("diffusers-guidance", host=host, stateless_http=True, log_level="WARNING")
    server._mcp_server.version = version("diffusers-guidance")  # else clients are told the version of `mcp`
    waiting, lessons = [0], Lessons()

    async def done(start: Callable[[], Generator[News, None, R]], context: Context) -> R:
        """Follows a job to its end, and tells the client its progress."""
        if waiting[0] >= WAITING:
            raise ToolError("Too many calls are waiting. Try again in a minute.")
        waiting[0] += 1
        work: Generator[News, None, R] | None = None
        try:
            with _told():
                work = start()
                while True:
                    news = await to_thread.run_sync(_next, work)
                    if not isinstance(news, News):
                        return news[0]
                    await context.report_progress(news.done, news.total, news.what)
        finally:
            waiting[0] -= 1
            if work is not None:
                with anyio.CancelScope(shield=True):
                    await to_thread.run_sync(work.close)

    @server.tool()
    async def generate(
        context: Context,
        prompt: Prompt = EXAMPLES[0],
        want: Annotated[
            str,
            Field(description=f"What you want: {', '.join(PRESETS)}.", json_schema_extra={"enum": [*PRESETS]}),
        ] = FIRST,
        guidance_scale: Annotated[float | None, Field(description="Default: the scale of `want`.")] = None,
        seed: Seed = 0,
        steps: Steps = 20,
        policy: Annotated[str, Field(description=f"Replaces the policy of `want`: {_policies()}.")] = "",
        knobs: Annotated[
            dict[str, float | str | bool | None] | None,
            Field(
                description='Of the rule and the policy, such as {"save": 0.4}; {"rule": "TCFG"}; {"schedule": '
                '"linear(9, 3)"}; {"learn": true} makes this picture in full, and answers with a `lesson` for the next '
                "ones."
            ),
        ] = None,
        lesson: Annotated[
            str, Field(description="That of an earlier answer: Forecast uses what that picture taught.")
        ] = "",
        negative_prompt: Annotated[str, Field(description="What the picture should not show.")] = "",
        scheduler: Scheduler = OWN,
        model: Model = BUNDLED,
    ) -> Annotated[CallToolResult, Made]:
        """Makes a picture from a prompt, with guidance that takes less time or does not burn at a high scale."""
        with _told():
            if want not in PRESETS:
                raise ValueError(f"want={want!r}: one of {', '.join(PRESETS)}, please.")
            there = ["rule", "schedule", "width", "height", *app_settings.knobs()]
            if unknown := (knobs or {}).keys() - there:
                raise ValueError(f"knobs: {min(unknown)} is not one of them: there are {', '.join(there)}.")
            wanted = PRESETS[want].settings(model) | (knobs or {})
            wanted |= {"policy": policy} if policy else {}
            wanted |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
            wanted |= {"learn": True} if lesson else {}
            settings = Generation(
                **wanted, prompt=prompt, seed=seed, steps=steps, negative_prompt=negative_prompt, scheduler=scheduler,
                model=model, compare_with_plain=False,
            )  # fmt: skip
            known = lessons.find(lesson)
            if known is not None and (settings.policy, settings.model) != (Forecast.__name__, known.model):
                raise ValueError(f"lesson={lesson!r} is for Forecast on the model {known.model}.")
            for name in (knobs or {}).keys() & app_settings.knobs():
                owner = app_settings.knobs()[name].owner.__name__
                if owner not in (settings.rule, settings.policy):
                    raise ValueError(f"knobs: {name} is one of {owner}; this picture has {settings.rule} and "
                                     f"{settings.policy}.")  # fmt: skip
        outcome = await done(lambda: studio.generate(settings, known), context)
        told, asked = ("prompt", "seed", "rule", "policy"), outcome.settings
        made = Made(
            **{name: getattr(asked, name) for name in told},
            guidance_scale=asked.schedule or asked.guidance_scale,
            steps=asked.steps_made, nfe=outcome.guided.nfe, nfe_full=outcome.nfe_full,
            seconds=outcome.guided.seconds, saturation=outcome.guided.saturation, unread=outcome.unread,
            link=f"?{asked.address}", learned=outcome.lesson, lesson=lessons.keep(outcome.learned, lesson),
        )  # fmt: skip
        return _answer(outcome.guided.pictures[0], made, outcome.guided.reports[0].summary())

    @server.tool()
    async def compare(
        context: Context,
        prompt: Prompt = EXAMPLES[0],
        ways: Ways = ["CFG", "default", "Forecast(0.45)", "CFG@15", "AG@15"],  # noqa: B006
        guidance_scale: Annotated[float, Field(description="The scale of columns that do not name one.")] = 5.0,
        seed: Seed = 0,
        steps: Steps = 20,
        scheduler: Scheduler = OWN,
        model: Model = BUNDLED,
    ) -> Annotated[CallToolResult, Compared]:
        """Makes the picture of one prompt under several rules and policies, side by side, with the cost of each."""
        with _told():
            if not ways:
                raise ValueError("ways is empty: name at least one, such as CFG or default.")
            form = Grid(
                prompt=prompt, rules=[], policies=[], scales=[guidance_scale], columns="\n".join(ways), seed=seed,
                steps=steps, scheduler=scheduler, model=model,
            )  # fmt: skip
        comparison = await done(lambda: studio.compare(form), context)
        figures = Compared(columns=[OneWay(**column) for column in comparison.to_dict()["columns"]])
        said = "\n".join(f"{each.name}: {each.nfe} of {each.nfe_full} NFEs" for each in figures.columns)
        return _answer(app_show.grid_png(form, comparison), figures, said)

    @server.tool()
    async def benchmark(
        context: Context,
        prompts: Annotated[int, Field(description="The number of bundled prompts, 1 to 6.")] = 1,
        guidance_scale: Annotated[float, Field(description="The scale of all runs.")] = 5.0,
        steps: Steps = 20,
        scheduler: Scheduler = OWN,
        model: Model = BUNDLED,
    ) -> Annotated[CallToolResult, Measured]:
        """Measures how near each policy comes to full CFG, and with how many evaluations. Takes a minute or more."""
        with _told():
            form = Trial(prompts=prompts, guidance_scale=guidance_scale, steps=steps, scheduler=scheduler, model=model)
        rows = await done(lambda: studio.benchmark(form), context)
        found = app_work.recommended(rows)
        best = found[0].label if found else ""
        plot = app_show.to_picture(app_show.frontier_plot(rows))
        said = "\n".join(f"{row.label}: {row.nfe:g} NFEs, {row.psnr:.1f} dB" for row in rows[1:])
        figures = Measured(rows=[OnePolicy(**vars(row)) for row in rows], recommended=best)
        return _answer(plot, figures, said)

    return server


def _policies() -> str:
    return ", ".join(Generation.kinds()["policy"].choices)


def _next(work: Generator[News, None, R]) -> News | tuple[R]:
    """The next news, or a tuple with the result: `StopIteration` does not cross threads."""
    try:
        return next(work)
    except StopIteration as stopped:
        return (stopped.value,)


@contextmanager
def _told() -> Any:
    """Shows an error as its sentence alone, like the page."""
    try:
        with sentences():
            yield
    except gr.Error as error:
        raise ToolError(error.message) from None


def _answer(picture: Image.Image, figures: BaseModel, said: str) -> CallToolResult:
    data = base64.b64encode(png_of(picture)).decode()
    content: list[Any] = [
        ImageContent(type="image", data=data, mimeType="image/png"),
        TextContent(type="text", text=said),
    ]
    return CallToolResult(content=content, structuredContent=figures.model_dump(mode="json"))


class Served:
    """ASGI middleware that answers at `PATH`. It keeps the server's sessions as long as the app runs."""

    def __init__(self, app: ASGIApp, server: FastMCP):
        self.app = app
        server.streamable_http_app()  # makes the session manager
        self.sessions = server.session_manager

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            async with self.sessions.run():
                await self.app(scope, receive, send)
        elif scope["type"] == "http" and scope["path"].rstrip("/") == PATH:
            await self.sessions.handle_request(scope, receive, send)
        else:
            await self.app(scope, receive, send)
