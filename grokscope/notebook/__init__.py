"""For people: plots, widgets, clusters."""
