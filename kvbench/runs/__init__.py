"""Running cells: the decode loop, the tasks, one cell, a sweep."""
