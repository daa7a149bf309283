"""All that knows text: tokens to text and back, stop strings, chat templates and their sandbox."""
