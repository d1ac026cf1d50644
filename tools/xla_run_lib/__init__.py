"""The parts of tools/xla_run.py."""
