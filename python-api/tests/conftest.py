"""Fixtures: the backend, and random numbers from a seed that is fresh in every run."""

from __future__ import annotations

import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

# --import-mode=importlib leaves this folder off sys.path; the helpers beside this file are needed.
sys.path.insert(0, str(Path(__file__).parent))
for _helper in (
    "cases",
    "device_decode",
    "device_sparse_decode",
    "float64_reference",
    "kv_cache_bytes",
    "tolerances",
):
    pytest.register_assert_rewrite(_helper)

import hypothesis  # noqa: E402
import torch  # noqa: E402
from backends import BACKENDS, Backend, parameters  # noqa: E402

SEED_VARIABLE = "FLASH_MLA_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(4), "little"))

# An example is a whole attention call, whose time says nothing about the strategy that drew it.
hypothesis.settings.register_profile(
    "flash_mla",
    deadline=None,
    max_examples=20,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("flash_mla")


def pytest_addoption(parser: pytest.Parser) -> None:
    names = [b.name for b in BACKENDS]
    text = "run tests of these backends only, and fail where one cannot run; may be repeated"
    parser.addoption("--backend", action="append", choices=names, help=text)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("backend")
    if not wanted:
        return
    missing = [f"{b.name}: {b.skip_reason}" for b in BACKENDS if b.name in wanted and b.skip_reason]
    if missing:
        raise pytest.UsageError(f"--backend={', '.join(missing)}")
    kept: list[pytest.Item] = []
    others: list[pytest.Item] = []
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        (others if backend and backend.name not in wanted else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=others)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # One number repeats a whole run, hypothesis included, unless the user gave it its own.
    if getattr(config.option, "hypothesis_seed", None) is None:
        config.option.hypothesis_seed = str(SEED)


def pytest_report_header(config: pytest.Config) -> list[str]:
    skipped = [f"{b.name} ({b.skip_reason})" for b in BACKENDS if b.skip_reason]
    return [
        f"seed: {SEED} (repeat this run with {SEED_VARIABLE}={SEED})",
        f"backends: {', '.join(b.name for b in BACKENDS if not b.skip_reason)}"
        + (f"; skipped: {', '.join(skipped)}" if skipped else ""),
    ]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Again at the end: -q leaves the header out, and a failure is worth nothing without it."""
    terminalreporter.write_line(f"seed: {SEED} (repeat this run with {SEED_VARIABLE}={SEED})")


@pytest.fixture(scope="session", params=parameters(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Session-wide, so that hypothesis may use it and the environment changes once a backend."""
    chosen: Backend = request.param
    with pytest.MonkeyPatch.context() as patch:
        if chosen.kernel is not None:
            patch.setenv("FLASH_MLA_KERNEL", chosen.kernel)
        yield chosen


@pytest.fixture(autouse=True)
def _backends_of_other_tests_are_not_forced(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend stays set up until the session's next one is."""
    if "backend" not in request.fixturenames:
        monkeypatch.delenv("FLASH_MLA_KERNEL", raising=False)


@pytest.fixture(scope="module")
def gpu_memory_is_given_back() -> Iterator[None]:
    """For modules with tests that make caches of several GiB."""
    yield
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    """What a backend that is still being built does not serve is skipped, with its own reason."""
    chosen = pyfuncitem.funcargs.get("backend")
    try:
        return (yield)
    except Exception as error:
        if isinstance(chosen, Backend) and chosen.need_not_serve(error):
            pytest.skip(f"{chosen.name}: {error}")
        raise


@pytest.fixture
def gen(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator of this test's own: the same numbers whatever other tests run before it."""
    seed = SEED ^ zlib.crc32(request.node.nodeid.encode())
    return torch.Generator().manual_seed(seed)
