"""Methods compared on the same teachers: configuration, runs in processes of their own, and one table."""
