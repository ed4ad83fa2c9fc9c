"""The artifact file: container, structure, limits, validation, and its bytes by cause."""
