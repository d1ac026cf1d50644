"""Room audit/: what a run would cost or trip over, said before it starts. Uses every room below it."""
