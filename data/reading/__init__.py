"""From the sources of a domain to the documents of it that are kept."""
