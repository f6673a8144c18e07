"""Our lines in the original trainers: one `patch.toml` a method. README.md describes the format."""
