"""Room cli/: parses, checks and prints; holds no logic that a library user would miss. Imports no torch."""
