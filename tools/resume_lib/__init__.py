"""The parts of tools/resume.py."""
