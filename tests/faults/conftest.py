"""What all fault suites share."""

from refusals import refused  # noqa: F401


def pytest_terminal_summary(terminalreporter):
    """How many cases each file has that passed: what the suites are counted by."""
    counts: dict[str, int] = {}
    for report in terminalreporter.getreports("passed"):
        name = report.nodeid.split("::")[0]
        if report.when == "call" and "/faults/" in name:
            counts[name] = counts.get(name, 0) + 1
    for name, count in sorted(counts.items()):
        terminalreporter.write_line(f"{name}: {count} cases")
