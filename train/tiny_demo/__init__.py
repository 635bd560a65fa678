"""The embedded default model, phi3-tiny-demo: the tasks it learns and the script that makes it."""
