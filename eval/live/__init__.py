"""Views of commands while they run: the live dashboard, and the parts that all views are made of."""
