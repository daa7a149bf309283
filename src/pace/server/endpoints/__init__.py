"""One file per family of endpoints: requests in, answers and streams out."""
