"""What is measured on a cell, and how sure the numbers are."""
