"""Room lightning/: accelerator, strategy, precision and checkpoint IO. Knows Lightning, not NeMo."""
