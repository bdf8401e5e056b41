"""Commands: what a user types, one module a subcommand."""
