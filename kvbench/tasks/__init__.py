"""What is measured of a cell, one task a measurement, and the decoding they share."""
