"""What the tests share: property tests without deadlines, and a run in which nothing may be skipped."""

import os

from hypothesis import HealthCheck, settings

# The first call of a kernel compiles it, whatever the deadline.
settings.register_profile("kernels", deadline=None, suppress_health_check=[
    HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large])
settings.load_profile("kernels")


def pytest_terminal_summary(terminalreporter):
    skipped = terminalreporter.stats.get("skipped", [])
    if skipped and os.environ.get("IXY_NUMBA_NO_SKIP"):
        terminalreporter.section("skipped, but IXY_NUMBA_NO_SKIP is set")


def pytest_sessionfinish(session, exitstatus):
    """On a machine that has every part (CI), a skipped test is a failure."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter and exitstatus == 0 and os.environ.get("IXY_NUMBA_NO_SKIP") and reporter.stats.get("skipped"):
        session.exitstatus = 1
