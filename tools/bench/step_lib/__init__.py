"""What tools/bench/step.py starts in processes of their own."""
