"""What a user may ask for: composed from yaml and words, built into objects, refused in one line."""
