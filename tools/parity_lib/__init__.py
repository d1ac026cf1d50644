"""What tools/parity.py and tools/zero.py share."""
