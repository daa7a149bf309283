"""What `pace bench` and `pace eval` measure. Every speed stands beside the machine's own roof, or another speed of the same
run."""
