"""The page: its three tabs, and the endpoints of the same names for `gradio_client` and MCP."""

import inspect
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from textwrap import shorten
from typing import Any, cast
from urllib.parse import parse_qsl

import gradio as gr
from starlette.middleware import Middleware

from diffusers_guidance import samples
from diffusers_guidance.pipelines.app import curve as app_curve
from diffusers_guidance.pipelines.app import show as app_show
from diffusers_guidance.pipelines.app import work as app_work
from diffusers_guidance.pipelines.app.controls import (
    ON_DEVICE,
    Controls,
    choice_of_model,
    endpoint,
    finished,
    quietly,
    relayed,
    reporting,
)
from diffusers_guidance.pipelines.app.device import Stopped
from diffusers_guidance.pipelines.app.limits import SmallRequests
from diffusers_guidance.pipelines.app.settings import (
    BUNDLED,
    COMPARISONS,
    EXAMPLES,
    PRESETS,
    SHOWN,
    Generation,
    Grid,
    Trial,
    comparison,
    knobs,
    knobs_of,
    policies,
    rules,
)
from diffusers_guidance.pipelines.app.suited import suited
from diffusers_guidance.pipelines.app.work import Learned, News, Outcome, Studio
from diffusers_guidance.pipelines.pictures.columns import changes
from diffusers_guidance.pipelines.pictures.texts import counted
from diffusers_guidance.policies import Forecast, Policy
from diffusers_guidance.scales import text

WAITING = 32
"""How many jobs may wait in the queue."""
VISITORS = 128
"""How many pages the server remembers, with their last pictures. Older pages can no longer go back to theirs."""

REMEMBERED = 12
"""How many results of a visit are kept. A user can go back to them."""
TURNS = 3
"""How often the top's first two pictures are made. Those with the median ratio of the seconds are shown."""

TO_RESULT = """() => {
    if (innerWidth < 900) document.getElementById("status").scrollIntoView({behavior: "smooth"});
}"""
"""Scrolls to the result. If the page has one column, the result may be out of sight."""


LATER = 2.0
"""The seconds after which a page looks again for pictures that are still being made."""

Openings = dict[str, list[Outcome] | None]
"""The top of the page on each model (`welcomed`), by the model's name; None while it is being made."""


def build(studio: Studio, openings: Openings, first: Outcome | None = None) -> gr.Blocks:
    """The whole page. It looks into `openings` at each choice of a model, and again until the model's are made.

    Args:
        first: what the page's own settings make, to open with.
    """

    def top(model: str) -> tuple[str, Any]:
        """The top of the page, and whether to look again."""
        made = openings.get(model, [])
        return app_show.head(made or [], TURNS), gr.Timer(active=made is None)

    with gr.Blocks(title="diffusers-guidance", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        head = gr.HTML(app_show.head(openings.get(BUNDLED) or [], TURNS))
        model = choice_of_model(studio.models)
        again = gr.Timer(LATER, active=False)
        gr.on(
            [model.change, again.tick], top, model, [head, again],
            queue=False, show_progress="hidden", api_visibility="private",
        )  # fmt: skip
        with gr.Tab("Generate"):
            prompt = generate_tab(studio, page, model, first)
        with gr.Tab("Compare") as tab:
            compare_tab(studio, page, model, tab, prompt)
        with gr.Tab("Benchmark"):
            benchmark_tab(studio, model)
    return page.queue(max_size=WAITING, api_open=False)


def welcomed(studio: Studio, model: str) -> list[Outcome]:
    """Makes the top of the page: both uses beside plain CFG, on the same prompt and seed."""

    def made(preset: str) -> Outcome:
        asked = {"prompt": suited(model).examples[0], "model": model} | PRESETS[preset].settings(model)
        return finished(studio.generate(Generation(**asked)))

    finished(studio.generate(Generation(steps=2, model=model)))  # warms the model up before the times that are shown
    sooner, higher = SHOWN
    turns = [made(sooner) for _ in range(TURNS)]
    return [sorted(turns, key=lambda each: each.ratio or 0.0)[TURNS // 2], made(higher)]


def _open_others(studio: Studio, openings: Openings) -> None:
    """Makes the openings that are missing, while the page is up. A visitor's work goes between theirs."""
    missing = [model for model, made in openings.items() if made is None]
    try:
        with suppress(Stopped):  # the page ends
            for model in missing:
                openings[model] = welcomed(studio, model)
    finally:
        openings.update({model: [] for model in missing if openings[model] is None})  # no page waits for them


# Generate


def generate_tab(studio: Studio, page: gr.Blocks, model: Any, first: Outcome | None) -> Any:
    """Lays out the tab "Generate", and returns the control of the prompt."""
    controls = Controls(Generation, studio.models, model)
    with gr.Row(elem_classes="dg-work"):
        with gr.Column(elem_classes="dg-ask", min_width=0):
            controls.add("prompt", max_lines=4)
            examples = _chips(controls["prompt"], EXAMPLES)
            with gr.Row():
                run = gr.Button("Generate", variant="primary", scale=3, min_width=120)
                stop = gr.Button("Cancel", variant="secondary", scale=1, min_width=80)
        with gr.Column(elem_classes="dg-result", min_width=0):
            status = gr.HTML(_said(first) if first else app_show.note("Ready."), elem_id="status", padding=False)
            stage = gr.HTML(_stage(first) if first else app_show.empty("The picture comes here."), padding=False)
            numbers = gr.HTML(app_show.numbers(first) if first else "", padding=False, elem_classes="dg-last")
            run_strip = gr.HTML(app_show.strip(first) if first else "", padding=False, elem_classes="dg-last")
            with gr.Row(visible=False) as visit:
                history = gr.Gallery(
                    label="Pictures of this visit", show_label=False, format="png", columns=6, height="auto", scale=5,
                    interactive=False, object_fit="contain", allow_preview=False, elem_id="history", buttons=[],
                    min_width=280,
                )  # fmt: skip
                keep = gr.Button("Keep this one on the left", scale=1, min_width=120, size="sm")
            with gr.Accordion("Code that makes this picture", open=False):
                code = gr.Code(
                    first.code if first else None, label="Python", language="python", interactive=False, wrap_lines=True
                )
        with gr.Column(elem_classes="dg-knobs", min_width=0):
            preset = gr.Radio(
                list(PRESETS), value=next(iter(PRESETS)), label="What you want", elem_classes="dg-choices"
            )
            controls.add("guidance_scale")
            controls.add("learn", visible=Generation.defaults()["policy"] == Forecast.__name__)
            controls.add("compare_with_plain")
            with gr.Accordion("Picture: seed, steps, scheduler, size", open=False):
                controls.add("negative_prompt")
                with gr.Row():
                    controls.add("seed", "random_seed", min_width=120)
                controls.add("steps", "scheduler", "batch_size", "schedule")
                _draw_the_schedule(controls)
                with gr.Row():
                    controls.add("width", "height", min_width=160)
                gr.HTML(app_show.picture_file(), padding=False)
            with gr.Accordion("Rule and policy", open=False):
                told = {}
                for part, types in (("rule", rules()), ("policy", policies())):
                    controls.add(part)
                    chosen_first = types[Generation.defaults()[part]]
                    told[part] = gr.HTML(app_show.about(chosen_first), padding=False)
                    for name in [name for each in types.values() for name in knobs_of(each) if name != "learn"]:
                        controls.add(name, visible=name in knobs_of(chosen_first))
    learned, visited, kept = gr.State(None), gr.State([first] if first else []), gr.State(None)
    now = gr.State(first)
    values = [controls[name] for name in Generation.kinds()]

    def shown(outcome: Outcome, beside: Outcome | None) -> dict[Any, Any]:
        """Updates that show an outcome, beside its plain CFG picture or the kept outcome `beside`."""
        return {
            status: _said(outcome),
            stage: _stage(outcome, beside),
            numbers: app_show.numbers(outcome),
            run_strip: app_show.strip(outcome),
            code: outcome.code,
            controls["seed"]: outcome.settings.seed,
            now: outcome,
        }

    @reporting(status)
    def on_run(*given: Any) -> Iterator[dict[Any, Any]]:
        *settings, known, before, beside = given
        form = controls.read(settings)
        outcome = yield from relayed(
            studio.generate(form, known, forming=True),
            lambda news: (
                {status: app_show.progress_bar(news)}
                | ({stage: app_show.forming(news.pictures[0], form.prompt)} if news.pictures else {})
            ),
        )
        seen = [*before, outcome][-REMEMBERED:]
        yield shown(outcome, beside) | {
            learned: outcome.learned or known,
            visited: seen,
            history: _thumbnails(seen),
            visit: gr.update(visible=len(seen) > 1),
        }

    def on_stop(last: Outcome | None, beside: Outcome | None, said: str) -> dict[Any, Any]:
        """Shows the last pictures again, instead of those that were cancelled."""
        if not app_show.is_progress(said):
            return {status: gr.skip()}
        pictures = app_show.empty("The picture comes here.") if last is None else _stage(last, beside)
        return {status: app_show.note("Cancelled."), stage: pictures}

    outputs = [status, stage, numbers, run_strip, code, controls["seed"], now, learned, visited, history, visit]
    on_page: dict[str, Any] = {"api_visibility": "private"}
    event: dict[str, Any] = {
        "fn": on_run, "inputs": [*controls.inputs, learned, visited, kept], "outputs": outputs, "preprocess": False,
        "show_progress_on": status, **ON_DEVICE, **on_page,
    }  # fmt: skip
    started = gr.on([run.click, controls["prompt"].submit], **event)
    run.click(None, js=TO_RESULT, **on_page)
    chosen = examples.click(lambda sample: sample[0], examples, controls["prompt"], queue=False, **on_page)
    followed = chosen.then(**event)
    stopped = stop.click(None, cancels=[started, followed], queue=False, **on_page)
    stopped.then(on_stop, [now, kept, status], [status, stage], queue=False, **on_page)

    follow = _keep_in_step(preset, controls, told)
    controls.follow_the_model()
    model.input(
        lambda model: gr.update(samples=[[text] for text in suited(model).examples]), model, examples,
        queue=False, show_progress="hidden", **on_page,
    )  # fmt: skip

    def on_switch(model: str, last: Outcome | None, said: str) -> Any:
        """Says of which model the picture is, once another one is chosen."""
        if last is None or app_show.is_progress(said):
            return gr.skip()
        made = last.settings.model
        other = f"This picture and its figures are by {made}: press Generate for one by {model}."
        return _said(last) if made == model else app_show.note(other)

    model.input(on_switch, [model, now, status], status, queue=False, show_progress="hidden", **on_page)

    def on_select(before: list[Outcome], beside: Outcome | None, selected: gr.SelectData) -> dict[Any, Any]:
        if selected.index >= len(before):  # the server has dropped this page's pictures
            return {status: gr.skip()}
        outcome = before[selected.index]
        return controls.put(outcome.settings) | shown(outcome, beside)

    back = history.select(on_select, [visited, kept], [*values, *outputs[:7]], queue=False, **on_page)
    follow(back)

    def on_keep(outcome: Outcome | None, beside: Outcome | None) -> dict[Any, Any]:
        beside = outcome if beside is None else None
        words = "Keep this one on the left" if beside is None else "Put plain CFG back on the left"
        again = _stage(outcome, beside) if outcome is not None else gr.skip()
        return {kept: beside, keep: gr.update(value=words), stage: again}

    keep.click(on_keep, [now, kept], [kept, keep, stage], queue=False, **on_page)

    query = gr.Textbox(visible=False)

    def on_link(search: str) -> dict[Any, Any]:
        """Shows the settings that an address carries."""
        given = {name: text for name, text in parse_qsl(search.lstrip("?"), keep_blank_values=True) if name[:2] != "__"}
        if not given:
            return {status: gr.skip()}
        try:
            form = Generation.read(given)
        except ValueError as error:
            return {status: app_show.note(str(error))}
        return controls.put(form) | {status: app_show.note("The settings of the link are in place: press Generate.")}

    linked = page.load(
        on_link, query, [*values, status], js="() => location.search", queue=False, show_progress="hidden", **on_page
    )
    follow(linked)

    def generate(settings: Generation, known: Learned | None) -> Iterator[Any]:
        """Generates pictures with a rule and a policy; returns the first picture, a report, and all pictures."""
        outcome = yield from quietly(studio.generate(settings, known), 4)
        files = [app_show.in_a_file(picture).path for picture in outcome.guided.pictures]
        yield files[0], outcome.to_dict(), files, outcome.learned or known

    hidden = [gr.Image(visible=False, format="png", label="picture"), gr.JSON(visible=False, label="report"),
              gr.Gallery(visible=False, format="png", label="pictures")]  # fmt: skip
    endpoint(controls, generate, hidden, [learned])
    return controls["prompt"]


def _draw_the_schedule(controls: Controls) -> None:
    """Draws the scale over the steps as a curve, below its text."""
    drawn = gr.HTML(visible="hidden", padding=False, elem_id="schedule-curve")

    def draw(schedule: str, steps: int) -> Any:
        told = app_curve.shown(schedule, steps)
        # An empty curve is hidden, but stays on the page, so that it can appear at once.
        return gr.update(value=told, visible=True if told else "hidden")

    for each in ("schedule", "steps"):
        controls[each].change(
            draw, [controls["schedule"], controls["steps"]], drawn,
            queue=False, api_visibility="private", show_progress="hidden",
        )  # fmt: skip


def _chips(control: Any, texts: Sequence[str]) -> Any:
    """Texts to start from. A click on a text enters it and starts the work."""
    return gr.Dataset(
        components=[control], samples=[[text] for text in texts], label="Try", type="values", elem_classes="dg-chips"
    )


def _said(outcome: Outcome) -> str:
    asked = outcome.settings
    seeds = f"Seeds {asked.seeds[0]} to {asked.seeds[-1]}" if asked.batch_size > 1 else f"Seed {asked.seed}"
    said = f"{seeds} · {outcome.guided.name} · scale {text(asked.scale)} · {counted(asked.steps_made, 'step')}"
    said += f" · {asked.model}"
    return app_show.note(said, asked.address, outcome.unread, outcome.lesson)


def _stage(outcome: Outcome, beside: Outcome | None = None) -> str:
    """The pictures of an outcome, compared with those of plain CFG, or with the kept outcome `beside`."""
    guided, words = outcome.guided.pictures, outcome.settings.prompt
    if beside is not None and beside is not outcome:
        left = f"kept: {_short(beside)}"
        return app_show.stage([(beside.guided.pictures[0], guided[0])], left, _short(outcome), words)
    plain = outcome.plain.pictures if outcome.plain else [None] * len(guided)
    return app_show.stage([*zip(plain, guided, strict=True)], "plain CFG", _short(outcome), words)


def _short(outcome: Outcome) -> str:
    """The names of rule and policy, short, with the policy's own knobs; without CFG if a policy follows."""
    policy, chosen = outcome.settings.policy, cast(Policy, outcome.settings.make_policy())  # or a way, whose fields do
    own = changes(chosen)
    named = outcome.guided.name.removeprefix("CFG + ").replace(policy, f"{policy}({own})" if own else policy)
    return named.replace("EveryStep", "plain CFG").replace("AdaptiveGuidance", "AG")


def _thumbnails(seen: Sequence[Outcome]) -> list[tuple[str, str]]:
    return [
        (
            app_show.in_a_file(each.guided.pictures[0]).path,
            f"{shorten(each.settings.prompt, 24, placeholder='…')} · {_short(each)} @ {text(each.settings.scale)}",
        )
        for each in seen
    ]


def _keep_in_step(preset: Any, controls: Controls, told: dict[str, Any]) -> Callable[[Any], None]:
    """Keeps presets and controls in step.

    A preset sets rule, policy, scale and knobs. If these equal a preset, the page selects that preset.

    Returns:
        A function that makes the page follow another event, which sets these controls.
    """
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

    # This runs in the browser, so that a press of the button right after the choice already uses it.
    models = [*controls.models.offered, ""]  # "" stands for all other models
    known = json.dumps({model: {name: each.settings(model) for name, each in PRESETS.items()} for model in models})
    names = json.dumps([*set_by])
    of_model = f'(known => known[model] ?? known[""])({known})'
    choose = f"""(name, model, ...now) => {{
        const wanted = {of_model}[name] ?? {{}};
        return {names}.map((each, i) => each in wanted ? wanted[each] : now[i]);
    }}"""
    # The scale may differ: a preset only gives a scale to start from.
    recognise = f"""(model, ...now) => {{
        const is = (wanted, each, i) => !(each in wanted) || each == "guidance_scale" || wanted[each] === now[i];
        const found = Object.entries({of_model}).find(([_, wanted]) => {names}.every((each, i) => is(wanted, each, i)));
        return found ? found[0] : null;
    }}"""
    model, settings = controls["model"], [*set_by.values()]
    chosen = preset.input(None, [preset, model, *settings], settings, js=choose, **quick)
    chosen.then(visible, [rule, policy], shown, **quick)
    another = model.input(None, [preset, model, *settings], settings, js=choose, **quick)
    another.then(visible, [rule, policy], shown, **quick)
    gr.on([rule.input, policy.input], visible, [rule, policy], shown, **quick)
    gr.on([each.input for each in settings], None, [model, *settings], preset, js=recognise, **quick)

    def follow(event: Any) -> None:
        event.then(None, [model, *settings], preset, js=recognise, **quick)
        event.then(visible, [rule, policy], shown, **quick)

    return follow


# Compare


def compare_tab(studio: Studio, page: gr.Blocks, model: Any, tab: Any, prompt: Any) -> None:
    """Lays out the tab "Compare".

    Args:
        prompt: the prompt of the tab "Generate". This tab takes it over when it is opened.
    """
    controls = Controls(Grid, studio.models, model)
    with gr.Row(elem_classes="dg-work"):
        with gr.Column(elem_classes="dg-ask", min_width=0):
            controls.add("prompt", max_lines=4)
            examples = _chips(controls["prompt"], [*COMPARISONS])
            with gr.Row():
                run = gr.Button("Compare", variant="primary", scale=3, min_width=120)
                stop = gr.Button("Cancel", variant="secondary", scale=1, min_width=80)
        with gr.Column(elem_classes="dg-result", min_width=0):
            status = gr.HTML(padding=False, value=app_show.note(_planned(Grid().count)))
            grid = gr.HTML(app_show.grid_html(Grid()), padding=False)
            with gr.Row():
                png = gr.DownloadButton("Download PNG", visible=False, size="sm")
                table = gr.DownloadButton("Download JSON", visible=False, size="sm")
        with gr.Column(elem_classes="dg-knobs", min_width=0):
            controls.add("rules", "policies", "scales", "columns")
            with gr.Accordion("Picture: seed, steps, scheduler", open=False):
                controls.add("negative_prompt", "seed", "steps", "scheduler")
    choices = [controls[name] for name in ("rules", "policies", "scales", "columns")]
    on_page: dict[str, Any] = {"queue": False, "api_visibility": "private"}

    def planned(*values: Any) -> dict[Any, Any]:
        """Shows the empty grid that would be made."""
        downloads = {png: gr.update(visible=False), table: gr.update(visible=False)}
        try:
            form = controls.read(values)
        except ValueError as error:
            said = {status: app_show.note(str(error)), grid: app_show.empty("There is no grid of this choice.")}
            return {**said, run: gr.update(interactive=False), **downloads}
        return {
            status: app_show.note(_planned(form.count)),
            grid: app_show.grid_html(form),
            run: gr.update(interactive=True),
            **downloads,
        }

    gr.on(
        [each.input for each in choices], planned, controls.inputs, [status, grid, run, png, table], preprocess=False,
        show_progress="hidden", trigger_mode="always_last", **on_page,
    )  # fmt: skip
    chosen = examples.click(
        lambda sample, model: list(map(list, comparison(sample[0], model))), [examples, model], choices[:3], **on_page
    )
    scaled = controls.follow_the_model(lambda model: {"scales": [suited(model).scale]})
    scaled.then(planned, controls.inputs, [status, grid, run, png, table], preprocess=False, **on_page)
    # Each prompt is taken over once: a prompt that the user writes here stays.
    tab.select(
        None, [prompt, controls["prompt"]], controls["prompt"], **on_page,
        js="(there, here) => there === dg.taken ? here : (dg.taken = there)",
    )  # fmt: skip

    @reporting(status)
    def on_run(*values: Any) -> Iterator[dict[Any, Any]]:
        form = controls.read(values)
        yield {png: gr.update(visible=False), table: gr.update(visible=False)}  # these files hold the last result

        def so_far(news: News) -> dict[Any, Any]:
            return {status: app_show.progress_bar(news), grid: app_show.grid_html(form, news.so_far)}

        comparison = yield from relayed(studio.compare(form), so_far)
        drawn = _grid_picture(form, comparison)
        unread = app_work.unread(studio.models.get(form.model), form.prompt)
        yield {
            status: app_show.note(
                f"{counted(len(comparison.results), 'picture')}, seed {form.seed}, {comparison.scheduler}.",
                warning=unread,
            ),
            grid: app_show.grid_html(form, comparison),
            png: gr.update(value=app_show.in_a_file(drawn).path, visible=True),
            table: gr.update(value=_json_file(comparison.to_dict(), "compare.json"), visible=True),
        }

    _buttons(run, stop, on_run, controls, status, [grid, png, table], chosen)

    def compare(form: Grid) -> Iterator[Any]:
        """Makes the picture of one prompt under rules, policies and scales; returns a labelled grid and the figures."""
        comparison = yield from quietly(studio.compare(form), 2)
        yield app_show.in_a_file(_grid_picture(form, comparison)).path, comparison.to_dict()

    endpoint(
        controls,
        compare,
        [gr.Image(visible=False, format="png", label="grid"), gr.JSON(visible=False, label="figures")],
    )


def _planned(count: int) -> str:
    return f"{counted(count, 'picture')} of one prompt and one seed to make."


def _grid_picture(form: Grid, comparison: Any) -> Any:
    picture = app_show.grid_png(form, comparison)
    app_work.label(picture, {"settings": {name: getattr(form, name) for name in form.kinds()}})
    return picture


# Benchmark


def benchmark_tab(studio: Studio, model: Any) -> None:
    controls = Controls(Trial, studio.models, model)
    with gr.Row(elem_classes=["dg-work", "dg-wide"]):
        with gr.Column(elem_classes="dg-ask", min_width=0):
            with gr.Row():
                controls.add("prompts", "guidance_scale", "steps", min_width=240)
            with gr.Row():
                run = gr.Button("Run benchmark", variant="primary", scale=3, min_width=120)
                stop = gr.Button("Cancel", variant="secondary", scale=1, min_width=80)
            with gr.Accordion("Picture: seed, scheduler", open=False):
                controls.add("seed", "scheduler")
            controls.follow_the_model(lambda model: {"guidance_scale": suited(model).scale})
        with gr.Column(elem_classes="dg-result", min_width=0):
            status = gr.HTML(
                padding=False,
                value=app_show.note("This measures how near each policy comes to full CFG, and with how many NFEs."),
            )
            frontier = gr.HTML(app_show.empty("The plot comes here, and grows with every policy."), padding=False)
            table = gr.DownloadButton("Download JSON", visible=False, size="sm")

    @reporting(status)
    def on_run(*values: Any) -> Iterator[dict[Any, Any]]:
        form, points = controls.read(values), 0
        yield {table: gr.update(visible=False)}  # this file holds the last result

        def so_far(news: News) -> dict[Any, Any]:
            nonlocal points
            updates = {status: app_show.progress_bar(news)}
            if news.so_far is not None and len(news.so_far) != points:
                points = len(news.so_far)
                updates[frontier] = app_show.frontier_html(news.so_far)
            return updates

        found = yield from relayed(studio.benchmark(form), so_far)
        yield {
            status: app_show.note(f"{len(found)} ways to guide, averaged over {counted(form.prompts, 'prompt')}."),
            frontier: app_show.frontier_html(found),
            table: gr.update(value=_json_file(app_work.figures(form, found), "benchmark.json"), visible=True),
        }

    _buttons(run, stop, on_run, controls, status, [frontier, table])

    def benchmark(form: Trial) -> Iterator[Any]:
        """Measures policies against full CFG; returns a plot of fidelity against NFEs, and the figures."""
        found = yield from quietly(studio.benchmark(form), 2)
        plot = app_show.to_picture(app_show.frontier_plot(found))
        app_work.label(plot, {"settings": {name: getattr(form, name) for name in form.kinds()}})
        yield app_show.in_a_file(plot).path, app_work.figures(form, found)

    endpoint(
        controls,
        benchmark,
        [gr.Image(visible=False, format="png", label="plot"), gr.JSON(visible=False, label="figures")],
    )


# What the tabs share


def _buttons(
    run: Any, stop: Any, on_run: Callable, controls: Controls, status: Any, outputs: list[Any], after: Any = None
) -> None:
    """Connects the buttons that start and cancel a tab's work. The event `after`, if given, starts it too."""
    event: dict[str, Any] = {
        "fn": on_run, "inputs": controls.inputs, "outputs": [status, *outputs], "preprocess": False,
        "show_progress_on": status, "api_visibility": "private", **ON_DEVICE,
    }  # fmt: skip
    started = [run.click(**event)] + ([] if after is None else [after.then(**event)])

    def cancelled(shown: str) -> Any:
        return app_show.note("Cancelled.") if app_show.is_progress(shown) else gr.skip()

    stopped = stop.click(None, cancels=started, queue=False, api_visibility="private")
    stopped.then(cancelled, status, status, queue=False, api_visibility="private")


def _json_file(values: dict[str, Any], name: str) -> str:
    """Writes a JSON file among the app's outputs."""
    content = json.dumps(values, indent=1, allow_nan=False, ensure_ascii=False).encode()
    return app_show.keep(content, name)


def launch(
    host: str = "127.0.0.1",
    port: int | None = None,
    allow_models: Sequence[str] = (),
    mcp: bool = False,
    share: bool = False,
    welcome: bool = True,
) -> tuple[gr.Blocks, Studio]:
    """Builds the page and serves it from its own thread, at `page.local_url`.

    Args:
        welcome: whether the page opens with pictures: of the first model from the start, of the others soon after.
    """
    studio = Studio(allow_models)
    openings: Openings = {}
    first = None
    if welcome:
        openings = dict.fromkeys(samples.models()) | {BUNDLED: welcomed(studio, BUNDLED)}
        first = finished(studio.generate(Generation()))
    page = build(studio, openings, first)
    tools = []
    if mcp:
        from diffusers_guidance.pipelines.app.tools import Served, make_server

        tools = [Middleware(Served, make_server(studio, host))]
    # Newer versions of Gradio keep a history of runs, which would outlive its user.
    unkept = {"run_history": False} if "run_history" in inspect.signature(page.launch).parameters else {}
    page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        footer_links=["api"],
        enable_monitoring=False,
        allowed_paths=[],
        state_session_capacity=VISITORS,
        app_kwargs={"middleware": [Middleware(SmallRequests), *tools]},
        max_file_size="1kb",  # the page takes no uploads
        ssr_mode=False,
        pwa=False,
        css_paths=Path(__file__).with_name("page.css"),
        head=f"<script>{Path(__file__).with_name('page.js').read_text(encoding='utf-8')}</script>",
        theme=theme(),
        **unkept,
    )
    if welcome:
        threading.Thread(target=_open_others, args=(studio, openings), name="openings", daemon=True).start()
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
