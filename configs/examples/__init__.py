"""Routers from outside the package, as a researcher would write them; imported only when a config names them."""
