"""A module and a call become a Program."""
