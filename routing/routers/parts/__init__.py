"""What several routers are made of."""
