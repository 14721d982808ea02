"""The processes of one training: how they meet, share the work, watch one another and end together."""
