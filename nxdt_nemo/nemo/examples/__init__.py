"""What NeMo has as scripts in its repository and not in its wheel."""
