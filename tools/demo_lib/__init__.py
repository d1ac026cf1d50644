"""Pieces of `make demo`, each usable alone; `tools/demo.py` puts them together.

A tool, no room: nothing under nxdt_nemo/ imports it.

    corpus.py     English text out of the interpreter's own documentation, as JSON lines
    tokens.py     SentencePiece model, and .bin/.idx by Megatron's own writer (runs as a child)
    runs.py       child processes with a log file and a live progress bar
    curves.py     losses out of TensorBoard's event files; the curve as text and as a picture
    report.py     the closing table and docs/results/demo.md

Proof: tests/tools/test_demo.py.
"""
