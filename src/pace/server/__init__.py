"""`pace serve`: an HTTP server that speaks OpenAI's API; needs `pip install "pace[serve]"`."""
