"""Pieces of `make demo` and `make demo-finetune`, each usable alone; `tools/demo*.py` put them together.

A tool, no room: nothing under nxdt_nemo/ imports it.

    corpus.py     English text out of the interpreter's own documentation, as JSON lines
    tokens.py     SentencePiece model, and .bin/.idx by Megatron's own writer (runs as a child)
    data.py       both of them, once for each Python
    runs.py       child processes with a log file and a live progress bar
    stages.py     lines of progress, and the exit code
    curves.py     losses out of TensorBoard's event files; the curve as text and as a picture
    report.py     the closing table and docs/results/demo.md
    base_model.py a small Llama trained by transformers (runs as a child)
    answers.py    what transformers and peft make of the tuned models (runs as a child)

Proof: tests/tools/test_demo.py, tests/tools/test_demo_finetune.py.
"""
