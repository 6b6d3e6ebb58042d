"""The page: its three tabs, and the endpoints of the same names for `gradio_client` and MCP."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.processing_utils import save_bytes_to_cache, save_pil_to_cache
from gradio.utils import get_upload_folder
from starlette.middleware import Middleware

from diffusers_guidance.pipelines.app import show as app_show
from diffusers_guidance.pipelines.app import work as app_work
from diffusers_guidance.pipelines.app.controls import (
    ON_DEVICE,
    Controls,
    endpoint,
    finished,
    quietly,
    relayed,
    reporting,
)
from diffusers_guidance.pipelines.app.curve import shown
from diffusers_guidance.pipelines.app.limits import SmallRequests
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    COMPARISONS,
    EXAMPLES,
    PRESETS,
    Generation,
    Grid,
    Trial,
    knobs,
    knobs_of,
    policies,
    rules,
)
from diffusers_guidance.pipelines.app.work import News, Outcome, Studio
from diffusers_guidance.pipelines.pictures.make import Result
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.scales import text

WAITING = 32
"""How many may queue up."""
VISITORS = 128
"""How many pages the server keeps the last pictures of; older pages can no longer choose among theirs."""

TO_RESULT = """() => {
    if (innerWidth < 641) document.getElementById("status").scrollIntoView({behavior: "smooth"});
}"""
"""On a phone the result lies below the button."""


def build(studio: Studio, welcome: bool = True) -> gr.Blocks:
    """The whole page.

    Args:
        welcome: whether it opens with a picture, generated now.
    """
    first, results = welcomed(studio) if welcome else (None, [])
    with gr.Blocks(title="diffusers-guidance", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(app_show.head(results))
        with gr.Tab("Generate"):
            generate_tab(studio, first)
        with gr.Tab("Compare"):
            compare_tab(studio)
        with gr.Tab("Benchmark"):
            benchmark_tab(studio)
    return page.queue(max_size=WAITING, api_open=False)


def welcomed(studio: Studio) -> tuple[Outcome, list[Result]]:
    """What the page opens with, and beside it both uses, on the same prompt and seed: less time, and a high scale."""
    finished(studio.generate(Generation(steps=2)))  # so that the times shown are those of a warm model
    first = finished(studio.generate(Generation()))
    high = finished(studio.generate(Generation(**PRESETS["High scale without burn"].settings())))
    return first, [result for each in (first, high) for result in (each.plain, each.guided) if result is not None]


# Generate


def generate_tab(studio: Studio, first: Outcome | None) -> None:
    controls = Controls(Generation, studio.models)
    both = _pairs(first) if first else []
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            controls.add("prompt", max_lines=4)
            examples = gr.Dataset(
                components=[controls["prompt"]], samples=[[example] for example in EXAMPLES], label="Try",
                type="values", elem_classes="dg-chips",
            )  # fmt: skip
            preset = gr.Radio(
                list(PRESETS),
                value=next(iter(PRESETS)),
                label="Guidance",
                info="What you want; each sets the scale that it is for.",
                elem_classes="dg-choices",
            )
            controls.add("guidance_scale")
            with gr.Row():
                run = gr.Button("Generate", variant="primary", scale=3, min_width=120)
                stop = gr.Button("Cancel", variant="secondary", scale=1, min_width=80)
            controls.add("compare_with_plain")
            with gr.Accordion("Picture", open=False):
                controls.add("negative_prompt")
                with gr.Row():
                    controls.add("seed", "random_seed", min_width=120)
                controls.add("steps", "scheduler", "batch_size", "schedule")
                _draw_the_schedule(controls)
                with gr.Row():
                    controls.add("width", "height", min_width=120)
                controls.add("model")
                controls.sides_follow_the_model()
            with gr.Accordion("Rule and policy", open=False):
                told = {}
                for part, types in (("rule", rules()), ("policy", policies())):
                    controls.add(part)
                    chosen_first = types[Generation.defaults()[part]]
                    told[part] = gr.HTML(app_show.about(chosen_first), padding=False)
                    for name in [name for each in types.values() for name in knobs_of(each)]:
                        controls.add(name, visible=name in knobs_of(chosen_first))
        with gr.Column(scale=6, min_width=300):
            status = gr.HTML(app_show.note(_summary(first) if first else "Ready."), elem_id="status", padding=False)
            slider = gr.ImageSlider(
                both[0] if both else None,
                label=_sides(first.guided.name if first else "yours"),
                show_label=False,
                elem_id="slider",
                format="png",
                max_height=400,
            )
            picture = gr.Image(
                label="Picture", elem_id="picture", format="png", height=400, visible=_shown_if(not both),
                interactive=False,
                buttons=["download"],
            )  # fmt: skip
            gallery = gr.Gallery(
                label="All pictures", format="png", columns=4, height=170, visible=False, interactive=False,
                object_fit="contain", allow_preview=False,
            )  # fmt: skip
            numbers = gr.HTML(app_show.numbers(first) if first else "", padding=False, elem_classes="dg-last")
            plot = gr.HTML(
                app_show.similarity_plot(first.guided.reports[0]) if first else "", padding=False,
                elem_classes="dg-last",
            )  # fmt: skip
            with gr.Accordion("Code that makes this picture", open=False):
                code = gr.Code(
                    first.code if first else None, label="Python", language="python", interactive=False, wrap_lines=True
                )
    pairs = gr.State(both)

    def shown(outcome: Outcome) -> dict[Any, Any]:
        """The page's parts for a finished piece of work."""
        both, compared, several = _pairs(outcome), outcome.plain is not None, outcome.settings.batch_size > 1
        return {
            status: app_show.note(_summary(outcome)),
            slider: gr.update(
                value=both[0] if compared else None, visible=_shown_if(compared), label=_sides(outcome.guided.name)
            ),
            picture: gr.update(value=both[0][1], visible=_shown_if(not compared)),
            gallery: gr.update(value=outcome.guided.pictures, visible=several),
            numbers: app_show.numbers(outcome),
            plot: app_show.similarity_plot(outcome.guided.reports[0]),
            code: outcome.code,
            pairs: both,
            controls["seed"]: outcome.settings.seed,
        }

    @reporting(status)
    def on_run(*values: Any) -> Iterator[dict[Any, Any]]:
        work = studio.generate(controls.read(values))
        outcome = yield from relayed(
            work,
            lambda news: {status: app_show.progress_bar(news)}
            | ({picture: gr.update(value=news.pictures[0], visible=True), slider: gr.update(visible="hidden")}
               if news.pictures else {}),
        )  # fmt: skip
        yield shown(outcome)

    def on_stop(both: list[Any], shown: str) -> dict[Any, Any]:
        """The earlier pictures in place of those not made yet."""
        if not app_show.is_progress(shown):
            return {status: gr.skip()}
        compared = bool(both) and both[0][0] is not None
        return {
            status: app_show.note("Cancelled."),
            slider: gr.update(visible=_shown_if(compared)),
            picture: gr.update(
                visible=_shown_if(not compared),
                value=both[0][1] if both and not compared else None,
            ),
        }

    outputs = [status, slider, picture, gallery, numbers, plot, code, pairs, controls["seed"]]
    on_page: dict[str, Any] = {"api_visibility": "private"}
    event: dict[str, Any] = {
        "fn": on_run, "inputs": controls.inputs, "outputs": outputs, "preprocess": False,
        "show_progress_on": status, **ON_DEVICE, **on_page,
    }  # fmt: skip
    started = gr.on([run.click, controls["prompt"].submit], **event)
    run.click(None, js=TO_RESULT, **on_page)
    chosen = examples.click(lambda sample: sample[0], examples, controls["prompt"], queue=False, **on_page)
    followed = chosen.then(**event)
    stopped = stop.click(None, cancels=[started, followed], queue=False, **on_page)
    stopped.then(on_stop, [pairs, status], [status, slider, picture], queue=False, **on_page)

    def on_select(both: list[Any], selected: gr.SelectData) -> dict[Any, Any]:
        if selected.index >= len(both):  # the server no longer has this page's pictures
            return {picture: gr.skip()}
        plain, guided = both[selected.index]
        return {slider: (plain, guided) if plain is not None else None, picture: guided}

    gallery.select(on_select, pairs, [slider, picture], queue=False, **on_page)
    _keep_in_step(preset, controls, told)

    def generate(settings: Generation) -> Iterator[Any]:
        """Generates pictures with a rule and a policy; returns the first picture, a report, and all pictures."""
        outcome = yield from quietly(studio.generate(settings), 3)
        yield outcome.guided.pictures[0], outcome.to_dict(), outcome.guided.pictures

    hidden = [gr.Image(visible=False, format="png", label="picture"), gr.JSON(visible=False, label="report"),
              gr.Gallery(visible=False, format="png", label="pictures")]  # fmt: skip
    endpoint(controls, generate, hidden)


def _draw_the_schedule(controls: Controls) -> None:
    """The scale over the steps as a curve, below its text."""
    drawn = gr.HTML(visible="hidden", padding=False, elem_id="schedule-curve")

    def draw(schedule: str, steps: int) -> Any:
        told = shown(schedule, steps)
        return gr.update(value=told, visible=_shown_if(bool(told)))

    for each in ("schedule", "steps"):
        controls[each].change(
            draw, [controls["schedule"], controls["steps"]], drawn,
            queue=False, api_visibility="private", show_progress="hidden",
        )  # fmt: skip


def _shown_if(condition: bool) -> Any:
    """Shows or hides a part; a hidden one stays on the page, so that it appears at once when needed."""
    return True if condition else "hidden"


def _summary(outcome: Outcome) -> str:
    asked = outcome.settings
    return f"Seed {asked.seed} · {outcome.guided.name} · scale {text(asked.scale)} · {counted(asked.steps, 'step')}"


def _sides(name: str) -> str:
    return f"Left: plain CFG. Right: {name}."


def _pairs(outcome: Outcome) -> list[tuple[Any, Any]]:
    """The pictures, each behind that of plain CFG if there is one."""
    guided = outcome.guided.pictures
    return list(zip(outcome.plain.pictures if outcome.plain else [None] * len(guided), guided, strict=True))


def _keep_in_step(preset: Any, controls: Controls, told: dict[str, Any]) -> None:
    """Presets choose rule, policy, scale and knobs; these show what they are, and the preset they make, if any."""
    rule, policy = controls["rule"], controls["policy"]
    owners = {name: knob.owner for name, knob in knobs().items()}
    kinds: dict[str, dict[str, Any]] = {"rule": {**rules()}, "policy": {**policies()}}
    shown = [told["rule"], told["policy"], *(controls[name] for name in owners)]
    set_by = {"rule": rule, "policy": policy, "guidance_scale": controls["guidance_scale"]}
    set_by |= {name: controls[name] for name in owners}
    quick: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}

    def visible(rule: str, policy: str) -> list[Any]:
        parts = kinds["rule"][rule], kinds["policy"][policy]
        return [*map(app_show.about, parts), *(gr.update(visible=owner in parts) for owner in owners.values())]

    # In the browser itself, so that whoever presses the button in the next moment gets what was chosen.
    known = json.dumps([{name: each.settings(model) for name, each in PRESETS.items()} for model in (BUNDLED, "")])
    names = json.dumps([*set_by])
    of_model = f"({known})[model == {json.dumps(BUNDLED)} ? 0 : 1]"
    choose = f"""(name, model, ...now) => {{
        const wanted = {of_model}[name];
        return {names}.map((each, i) => each in wanted ? wanted[each] : now[i]);
    }}"""
    # At whatever scale: that of a preset is where to start from.
    recognise = f"""(model, ...now) => {{
        const is = (wanted, each, i) => !(each in wanted) || each == "guidance_scale" || wanted[each] === now[i];
        const found = Object.entries({of_model}).find(([_, wanted]) => {names}.every((each, i) => is(wanted, each, i)));
        return found ? found[0] : null;
    }}"""
    model, settings = controls["model"], [*set_by.values()]
    chosen = preset.input(None, [preset, model, *settings], settings, js=choose, **quick)
    chosen.then(visible, [rule, policy], shown, **quick)
    gr.on([rule.input, policy.input], visible, [rule, policy], shown, **quick)
    gr.on([each.input for each in settings], None, [model, *settings], preset, js=recognise, **quick)


# Compare


def compare_tab(studio: Studio) -> None:
    controls = Controls(Grid, studio.models)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            controls.add("prompt", max_lines=4)
            examples = gr.Dataset(
                components=[controls["prompt"]], samples=[[name] for name in COMPARISONS], label="Try", type="values",
                elem_classes="dg-chips",
            )  # fmt: skip
            controls.add("rules", "policies", "scales")
            with gr.Row():
                run = gr.Button("Compare", variant="primary", scale=3, min_width=120)
                stop = gr.Button("Cancel", variant="secondary", scale=1, min_width=80)
            with gr.Accordion("Picture", open=False):
                controls.add("negative_prompt", "seed", "steps", "scheduler", "model")
        with gr.Column(scale=8, min_width=300):
            status = gr.HTML(
                padding=False, value=app_show.note("One prompt and one seed under several rules, policies and scales.")
            )
            grid = gr.HTML(app_show.grid_html(Grid(), []), padding=False)
            with gr.Row():
                png = gr.DownloadButton("Download PNG", visible=False, size="sm")
                table = gr.DownloadButton("Download JSON", visible=False, size="sm")
    examples.click(
        lambda sample: list(map(list, COMPARISONS[sample[0]])), examples,
        [controls[name] for name in ("rules", "policies", "scales")], queue=False, api_visibility="private",
    )  # fmt: skip

    @reporting(status)
    def on_run(*values: Any) -> Iterator[dict[Any, Any]]:
        form = controls.read(values)
        yield {png: gr.update(visible=False), table: gr.update(visible=False)}  # they hold the last result

        def so_far(news: News) -> dict[Any, Any]:
            done = news.so_far.results if news.so_far else []
            return {status: app_show.progress_bar(news), grid: app_show.grid_html(form, done)}

        comparison = yield from relayed(studio.compare(form), so_far)
        drawn = _grid_picture(form, comparison)
        yield {
            status: app_show.note(
                f"{counted(len(comparison.results), 'picture')}, seed {form.seed}, {comparison.scheduler}."
            ),
            grid: app_show.grid_html(form, comparison.results),
            png: gr.update(value=save_pil_to_cache(drawn, get_upload_folder(), "compare", "png"), visible=True),
            table: gr.update(value=_json_file(comparison.to_dict(), "compare.json"), visible=True),
        }

    _buttons(run, stop, on_run, controls, status, [grid, png, table])

    def compare(form: Grid) -> Iterator[Any]:
        """Makes one prompt's picture under rules, policies and scales; returns a labelled grid and the figures."""
        comparison = yield from quietly(studio.compare(form), 2)
        yield _grid_picture(form, comparison), comparison.to_dict()

    endpoint(
        controls,
        compare,
        [gr.Image(visible=False, format="png", label="grid"), gr.JSON(visible=False, label="figures")],
    )


def _grid_picture(form: Grid, comparison: Any) -> Any:
    picture = app_show.grid_png(form, comparison)
    app_work.label(picture, {"settings": {name: getattr(form, name) for name in form.kinds()}})
    return picture


# Benchmark


def benchmark_tab(studio: Studio) -> None:
    controls = Controls(Trial, studio.models)
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            controls.add("prompts", "guidance_scale", "steps")
            with gr.Row():
                run = gr.Button("Run benchmark", variant="primary", scale=3, min_width=120)
                stop = gr.Button("Cancel", variant="secondary", scale=1, min_width=80)
            with gr.Accordion("Picture", open=False):
                controls.add("seed", "scheduler", "model")
        with gr.Column(scale=8, min_width=300):
            status = gr.HTML(
                padding=False,
                value=app_show.note("How near every policy comes to full CFG, and for how many evaluations."),
            )
            frontier = gr.HTML(app_show.empty("The plot grows with every measured policy."), padding=False)
            table = gr.DownloadButton("Download JSON", visible=False, size="sm")

    @reporting(status)
    def on_run(*values: Any) -> Iterator[dict[Any, Any]]:
        form, points = controls.read(values), 0
        yield {table: gr.update(visible=False)}  # it holds the last result

        def so_far(news: News) -> dict[Any, Any]:
            nonlocal points
            updates = {status: app_show.progress_bar(news)}
            if news.so_far is not None and len(news.so_far) != points:
                points = len(news.so_far)
                updates[frontier] = app_show.frontier_html(news.so_far)
            return updates

        found = yield from relayed(studio.benchmark(form), so_far)
        yield {
            status: app_show.note(f"{len(found)} ways of guiding, averaged over {counted(form.prompts, 'prompt')}."),
            frontier: app_show.frontier_html(found),
            table: gr.update(value=_json_file(app_work.figures(form, found), "benchmark.json"), visible=True),
        }

    _buttons(run, stop, on_run, controls, status, [frontier, table])

    def benchmark(form: Trial) -> Iterator[Any]:
        """Measures policies against full CFG; returns the plot of fidelity over evaluations, and the figures."""
        found = yield from quietly(studio.benchmark(form), 2)
        plot = app_show.to_picture(app_show.frontier_plot(found))
        app_work.label(plot, {"settings": {name: getattr(form, name) for name in form.kinds()}})
        yield plot, app_work.figures(form, found)

    endpoint(
        controls,
        benchmark,
        [gr.Image(visible=False, format="png", label="plot"), gr.JSON(visible=False, label="figures")],
    )


# What the tabs share


def _buttons(run: Any, stop: Any, on_run: Callable, controls: Controls, status: Any, outputs: list[Any]) -> None:
    """The buttons that start and end a tab's work."""
    started = run.click(
        on_run, controls.inputs, [status, *outputs], preprocess=False, show_progress_on=status,
        api_visibility="private", **ON_DEVICE,
    )  # fmt: skip

    def cancelled(shown: str) -> Any:
        return app_show.note("Cancelled.") if app_show.is_progress(shown) else gr.skip()

    stopped = stop.click(None, cancels=started, queue=False, api_visibility="private")
    stopped.then(cancelled, status, status, queue=False, api_visibility="private")


def _json_file(values: dict[str, Any], name: str) -> str:
    """A file among the app's outputs."""
    content = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False).encode()
    return save_bytes_to_cache(content, name, get_upload_folder())


def launch(
    host: str = "127.0.0.1",
    port: int | None = None,
    allow_models: Sequence[str] = (),
    mcp: bool = False,
    share: bool = False,
    welcome: bool = True,
) -> tuple[gr.Blocks, Studio]:
    """Builds the page and serves it from its own thread, at `page.local_url`."""
    studio = Studio(allow_models)
    page = build(studio, welcome)
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        mcp_server=mcp,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=["api"],
        run_history=False,
        enable_monitoring=False,
        allowed_paths=[],
        state_session_capacity=VISITORS,
        app_kwargs={"middleware": [Middleware(SmallRequests)]},
        max_file_size="1kb",  # nothing here takes uploads
        ssr_mode=False,
        pwa=False,
        css_paths=Path(__file__).with_name("page.css"),
        theme=theme(),
    )
    return page, studio


def theme() -> gr.Theme:
    """Quiet colours, legible in light and dark, with the fonts of `page.css`."""
    return gr.themes.Default(
        primary_hue="indigo",
        neutral_hue="slate",
        radius_size="lg",
        font=[gr.themes.Font("sans-serif")],
        font_mono=[gr.themes.Font("monospace")],
    ).set(
        body_text_color_subdued="*neutral_600",
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )
