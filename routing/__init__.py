"""Routers, balancing and specialization metrics."""
