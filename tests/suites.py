"""Which tests a run takes (`--suite`), and whether it may skip any (`--no-skips`)."""

import pytest

# Long suites stay out of a plain run; tests of the browser are part of it.
LONG_SUITES = ("clients", "fuzz", "chaos")
SUITES = (*LONG_SUITES, "browser")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("moerge")
    group.addoption("--suite", choices=SUITES, help="run the tests of this suite alone, the long ones included")
    group.addoption("--no-skips", action="store_true", help="a skipped test fails, unless it needs a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanted = config.getoption("--suite")

    def belongs(item: pytest.Item) -> bool:
        marks = {mark.name for mark in item.iter_markers()}
        return wanted in marks if wanted else marks.isdisjoint(LONG_SUITES)

    # A test that was named by its id runs, whatever its suite is.
    named = {argument.split("[")[0] for argument in config.args if "::" in argument}
    kept = [item for item in items if belongs(item) or item.nodeid.split("[")[0] in named]
    if len(kept) < len(items):
        kept_ids = {id(item) for item in kept}
        config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept_ids])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> object:
    report = yield
    refused = item.config.getoption("--no-skips") and report.skipped and not hasattr(report, "wasxfail")
    if refused and item.get_closest_marker("gpu") is None:
        _refuse(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> object:
    report = yield
    if collector.config.getoption("--no-skips") and report.skipped:
        _refuse(report)
    return report


def _refuse(report: pytest.TestReport | pytest.CollectReport) -> None:
    """Turn a skip into a failure that keeps the reason."""
    reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    report.outcome = "failed"
    report.longrepr = f"--no-skips was given, and this was skipped: {reason}"
