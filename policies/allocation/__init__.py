"""How published methods divide a budget among layers and heads; a part of any score policy."""
