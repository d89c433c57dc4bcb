"""Widgets: the explorer, in JupyterLab and wherever anywidget runs."""
