"""The smallest budget within a margin: the search, its table, its place on the page."""
