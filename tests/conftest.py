"""Tests run offline, on the installed package: the checkout itself is kept off the import path.

Started as `python -m pytest`, Python would find the checkout's folder `kernels/` before Hugging Face's package
of that name, which diffusers and transformers import where it is installed. Of tests/, `zoo/` alone is on the path.

Every run has a seed, which its header names; `--seed` runs it again. Each test begins with it, and so draws the
same whichever tests run before.
"""

import atexit
import gc
import os
import random
import secrets
import signal
import sys
from collections.abc import Generator
from pathlib import Path

# A shell starts a job in the background with Ctrl-C ignored, for its children too, and tests send them one.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing by more, and tests run side by side
os.environ.setdefault("RAY_worker_niceness", "0")  # by default Ray's workers wait for all other tests

gc.disable()  # until all is imported: a fifth of the time that imports take is spent looking for garbage in them

_CHECKOUT = Path(__file__).resolve().parents[1]
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != _CHECKOUT]

import numpy as np  # noqa: E402 (may load the wrong folder before the path is set)
import pytest  # noqa: E402
import torch  # noqa: E402


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, help="what the tests draw from; a fresh one by default")
    parser.addoption("--under", default="", help="for the conformance suite: some of triton,inference,autocast")


@pytest.hookimpl(wrapper=True, optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> Generator[None, int, int]:
    """One more than cores: a slow test may wait for a browser, or for a process of its own."""
    cores = yield
    return cores + ("not slow" not in config.option.markexpr)


@pytest.hookimpl(tryfirst=True)  # before hypothesis and xdist read their options
def pytest_configure(config: pytest.Config) -> None:
    if config.option.seed is None:
        config.option.seed = secrets.randbelow(2**32)
    config.option.hypothesis_seed = config.option.seed


def pytest_report_header(config: pytest.Config) -> str:
    return f"seed: {config.option.seed} (--seed {config.option.seed} draws the same again)"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if terminalreporter.stats.keys() & {"failed", "error"}:  # -q prints no header
        terminalreporter.write_line(pytest_report_header(config))


LONGEST = ("test_browser.py", "test_app.py", "test_interpreter.py", "test_gpu.py")
"""Files that take half a minute and more; each goes to one worker (Makefile)."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest begins first, so that no worker is alone with it at the end."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def pytest_collection_finish() -> None:
    """What is imported stays, so that garbage collections, also pytest's five at the end, need not walk through it."""
    gc.freeze()
    gc.enable()
    atexit.register(gc.unfreeze)  # lest Triton tells of what is left


@pytest.hookimpl(tryfirst=True)  # before any fixture
def pytest_runtest_setup(item: pytest.Item) -> None:
    _start(item.config.option.seed)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    _start(item.config.option.seed)


def _start(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed, for generators of a test's own."""
    return request.config.option.seed


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline like the bundled one, where a test is not about the pictures."""
    from small import write_small

    return write_small(tmp_path_factory.mktemp("small") / "emoji")
