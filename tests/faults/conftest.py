"""What all fault suites share."""

from refusals import refused  # noqa: F401
