"""What `pace bench` measures. Every figure stands beside the machine's own roof, measured in the same run."""
