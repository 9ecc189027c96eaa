"""Device memory itself, by address."""
