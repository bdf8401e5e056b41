"""What published code does where it departs from its paper; each departure is an option with a name."""
