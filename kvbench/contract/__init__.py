"""What every policy is held to: rules, each with its reason, run by the tests and by `kvbench check-policy`."""
