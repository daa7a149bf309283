"""Model architectures as data, and the one decoder that lowers them into a plan."""
