"""Run folders as records and arrays, read leniently."""
