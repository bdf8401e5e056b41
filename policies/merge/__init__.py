"""What published methods do with entries that go; a part of any score policy."""
