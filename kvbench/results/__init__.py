"""Records on the disk: written whole or not at all, claimed, sealed, redacted, kept in order."""
