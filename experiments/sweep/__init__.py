"""All rates and seeds of a method trained at once, as one vmapped step."""
