"""What tools/bench/xla_step.py starts in processes of their own."""
