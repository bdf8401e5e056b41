"""Does a results folder hold together? Checks that need only its records, each a file of its own."""
