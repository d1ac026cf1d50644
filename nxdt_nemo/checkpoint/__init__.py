"""Leaf checkpoint/: every training format to every other, as one stream of named whole tensors.

    families/   one file a model family: its tensors, Hugging Face's names for them, its config.json
    dialects/   how Megatron's relatives name and fuse the same tensors
    formats/    containers: folders, files, shards; a Reader and a Writer each
    io/         bytes: mapped files, torch zips, safetensors, pickles that run nothing

A reader says which box of which logical tensor each stored array holds (`placement.py`), a writer says the same of
the arrays it will store; `convert.py` copies the boxes. Neither knows the other. docs/checkpoint_formats.md shows
how a family or a format is added.
Imports neither NeMo nor Megatron nor torch_xla.
"""
