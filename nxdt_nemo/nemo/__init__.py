"""Room nemo/: what stands in for NeMo's own classes, in files of upstream's names. Uses every room below it."""
