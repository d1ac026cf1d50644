"""The parts of tools/nemo2.py."""
