"""Parameters and prompts -> Trace."""
